"""DALL-E: an image tokenizer and a transformer over a caption and the picture's codes (Ramesh et al. 2021).

B samples, T text tokens, h w the grid of codes, N = h * w, H W pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.errors import SettingsError
from zoo.generation.text_to_image import Score, generate
from zoo.generation.tokens import Predict, Sampling, sample_tokens, uniforms
from zoo.models.dalle_decoding import Decoding
from zoo.models.dalle_transformer import DalleTransformer, TransformerConfig
from zoo.models.dvae import Dvae, DvaeConfig
from zoo.models.vqgan import Vqgan, VqganConfig

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger("zoo.models")
PLAIN = Sampling()


@dataclass(frozen=True, kw_only=True)
class DalleConfig:
    """A whole DALL-E. `caption_dropout`: the part of captions that training leaves out, without which guidance has
    nothing to go away from; `empty`: the tokens before the padding of what then stands there. `code_dropout`: up to
    which part of a picture's codes training reads as others, so that the captions of a small data set are learnt, and
    not its pictures by heart from their first codes (Bowman et al. 2016, 3.1). `guidance`: what `generate` takes where
    none is asked for."""

    image: DvaeConfig | VqganConfig = field(default_factory=DvaeConfig)
    transformer: TransformerConfig = field(default_factory=TransformerConfig)
    caption_dropout: float = 0.1
    code_dropout: float = 0.0
    empty: tuple[int, ...] = ()
    guidance: float = 1.0

    @classmethod
    def from_dict(cls, sizes: Mapping) -> DalleConfig:
        """The config that `dataclasses.asdict`, and so a config.json, says. Unknown names raise TypeError."""
        parts = {"image": _image_config, "transformer": TransformerConfig.from_dict, "empty": tuple}
        return cls(**{name: parts[name](v) if name in parts else v for name, v in sizes.items()})


def _image_config(sizes: Mapping) -> DvaeConfig | VqganConfig:
    """A VQGAN's where a field is named that only it has."""
    names = {kind: {f.name for f in fields(kind)} for kind in (DvaeConfig, VqganConfig)}
    kind = VqganConfig if sizes.keys() & (names[VqganConfig] - names[DvaeConfig]) else DvaeConfig
    return kind.from_dict(sizes)


class Dalle(nn.Module):
    """Draws pictures of captions. `dvae` is trained before and stays as it is; `tokenizer` is needed to generate only.

    `dvae` may be a Vqgan. The parts may be others of the same use, with the `decoding` that draws from the transformer,
    see `zoo.models.dalle_mini`. Raises SettingsError when they do not fit each other.
    """

    def __init__(
        self,
        config: DalleConfig,
        dvae: nn.Module | None = None,
        transformer: DalleTransformer | None = None,
        tokenizer: Any = None,
        decoding: Callable[..., Predict] = Decoding,
    ):
        super().__init__()
        self.config = config
        self.dvae = dvae or (Vqgan if isinstance(config.image, VqganConfig) else Dvae)(config.image)
        self.transformer = transformer or DalleTransformer(config.transformer)
        self.tokenizer = tokenizer
        self.decoding = decoding
        self.dvae.requires_grad_(False)
        sizes = self.transformer.config
        for what, codes, tokens in (
            ("codes", self.dvae.vocab, sizes.vocab),
            ("codes per side", self.dvae.grid, sizes.grid),
        ):
            if codes != tokens:
                raise SettingsError(
                    f"the image tokenizer has {codes} {what} and the transformer {tokens}: it was trained with another"
                )

    @property
    def image_size(self) -> int:
        """The side of the pictures in pixels."""
        return self.dvae.image_size

    def train(self, mode: bool = True) -> Dalle:
        """The image tokenizer stays in evaluation mode."""
        super().train(mode)
        self.dvae.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Blocks' activations are computed again in the backward pass."""
        self.transformer.set_grad_checkpointing(enable)

    def forward(self, text: Tensor, image: Tensor | None = None, codes: Tensor | None = None) -> dict[str, Tensor]:
        """Text tokens (B, T) with pictures (B, 3, H, W) of 0..1, or their codes (B, h, w) -> the transformer's loss.

        In training, captions are left out and codes read as others at random, as the config says.
        """
        if codes is None:
            with torch.no_grad():
                codes = self.dvae.encode(image)
        if self.training and self.config.caption_dropout:
            dropped = torch.rand(len(text), 1, device=text.device) < self.config.caption_dropout
            text = torch.where(dropped, self.no_caption(text), text)
        codes, seen = codes.flatten(1), None
        if self.training and self.config.code_dropout:
            part = self.config.code_dropout * torch.rand(len(codes), 1, device=codes.device)
            others = torch.randint_like(codes, self.dvae.vocab)
            seen = torch.where(torch.rand(codes.shape, device=codes.device) < part, others, codes)
        return self.transformer(text, codes, seen)

    def no_caption(self, like: Tensor) -> Tensor:
        """The tokens (1, T) that stand for no caption beside such tokens (B, T)."""
        without = torch.full_like(like[:1], self.transformer.config.pad)
        without[0, : len(self.config.empty)] = like.new_tensor(self.config.empty)
        return without

    # --- drawing -----------------------------------------------------------------------------------------------------
    def generate(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        seed: int = 0,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float | None = None,
        rerank: Score | None = None,
        candidates: int | None = None,
        first_rows: tuple[Tensor, int] | None = None,
        preview: Callable[[int, Tensor], None] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> list[list[Image.Image]]:
        """For each prompt a list of `n` pictures; "" is a picture of anything.

        `temperature`, `top_k`, `top_p`, `guidance`: see `zoo.generation.tokens.Sampling`; where `guidance` is None, the
        config's is taken. `seed`, `candidates`, `rerank`, `batch_size`: see `zoo.generation.text_to_image.generate`.
        `first_rows`: a picture (3, H, W) of 0..1 and how many of its rows of codes every picture begins with.
        `preview(row, pictures so far (B, 3, H, W))` is told after each row of codes; what is not yet drawn is grey.
        Raises SettingsError, and CaptionTooLong for a prompt of more than T tokens.
        """
        guidance = self.config.guidance if guidance is None else guidance
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance)
        if guidance != 1 and not self.config.caption_dropout:
            logger.warning(
                "guidance=%g, but this model was trained without caption dropout: it does not know what a picture of "
                "no caption is, and guidance=1 may be better",
                guidance,
            )
        given = None if first_rows is None else self._codes_of(*first_rows)

        def draw(texts: list[str], seeds: list[int]) -> Tensor:
            return self.dvae.decode(self.draw(self._tokens(texts), seeds, sampling, given, preview, progress))

        words = {"candidates": candidates, "rerank": rerank, "batch_size": batch_size, "progress": progress}
        with torch.inference_mode():
            return generate(draw, prompts, n, seed, **words)

    def draw(
        self,
        text: Tensor,
        seeds: Sequence[int],
        sampling: Sampling = PLAIN,
        given: Tensor | None = None,
        preview: Callable[[int, Tensor], None] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Text tokens (B, T) and a seed each -> codes (B, h, w). `given` (g,): codes that each begins with.

        Neighbouring rows of the same text are candidates of one prompt, which is read once for all of them.
        """
        grid, length = self.transformer.config.grid, self.transformer.config.grid**2
        text, candidates = prompts_of(text)
        without = self.no_caption(text) if sampling.guidance != 1 else None
        predict = self.decoding(self.transformer, text, candidates, without, sampling.guidance)
        if given is not None:
            given = given.to(text.device).expand(len(seeds), -1)

        def on_token(position: int, tokens: Tensor) -> None:
            if preview is not None and (position + 1) % grid == 0:
                preview((position + 1) // grid, self._so_far(tokens))

        numbers = uniforms(seeds, length).to(text.device)
        return sample_tokens(predict, numbers, sampling, given, on_token, progress).unflatten(1, (grid, grid))

    def _so_far(self, tokens: Tensor) -> Tensor:
        """The first codes (B, rows * w) -> pictures, grey below."""
        grid = self.transformer.config.grid
        filled = torch.zeros(len(tokens), grid * grid, dtype=tokens.dtype, device=tokens.device)
        filled[:, : tokens.shape[1]] = tokens
        pictures = self.dvae.decode(filled.unflatten(1, (grid, grid)))
        drawn = tokens.shape[1] // grid * pictures.shape[2] // grid
        pictures[:, :, drawn:] = 0.5
        return pictures

    @property
    def _device(self) -> torch.device:
        """Where it computes: where its weights are, or where accelerate brings them."""
        hooks = (getattr(module, "_hf_hook", None) for module in self.transformer.modules())
        brought = (hook.execution_device for hook in hooks if getattr(hook, "execution_device", None) is not None)
        return torch.device(next(brought, next(self.transformer.parameters()).device))

    def _tokens(self, texts: list[str]) -> Tensor:
        if self.tokenizer is None:
            raise SettingsError(
                "generate needs the model's tokenizer: Dalle(..., tokenizer=), or load it by AutoLoader"
            )
        length = self.transformer.config.text_length
        tokens = self.tokenizer.tokenize_as_tensor(texts, context_length=length, truncate="error")
        return tokens.to(self._device)

    def _codes_of(self, picture: Tensor, rows: int) -> Tensor:
        """The codes of the first rows, (rows * w,). Raises SettingsError for a picture of another size."""
        size, grid = self.image_size, self.transformer.config.grid
        if tuple(picture.shape) != (3, size, size):
            raise SettingsError(f"first_rows: a picture (3, {size}, {size}) is needed, this is {tuple(picture.shape)}")
        if not 0 <= rows < grid:
            raise SettingsError(f"first_rows: of {grid} rows of codes {rows} cannot be given: give 0 to {grid - 1}")
        with torch.inference_mode():
            return self.dvae.encode(picture[None].to(self._device))[0, :rows].flatten()


def prompts_of(text: Tensor) -> tuple[Tensor, int]:
    """Rows of text tokens (B, T) -> one for each run of equal rows, (P, T), and how long the runs are; where they are
    not all equally long, all rows and 1."""
    changes = (text[1:] != text[:-1]).any(1).nonzero()[:, 0] + 1
    starts = [0, *changes.tolist(), len(text)]
    lengths = {end - start for start, end in pairwise(starts)}
    return (text[starts[:-1]], lengths.pop()) if len(lengths) == 1 else (text, 1)
