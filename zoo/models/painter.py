"""Drawing pictures code by code: what is alike in every model that has an image tokenizer and a transformer over codes.

B samples, h w the grid of codes, N = h * w, H W pixels.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.errors import SettingsError
from zoo.generation.text_to_image import Score, generate
from zoo.generation.tokens import Predict, Sampling, sample_tokens, uniforms

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger("zoo.models")
PLAIN = Sampling()


class Painter(nn.Module, ABC):
    """`generate`, for a model that has these parts.

    `transformer`: what its `config` calls `grid` and `vocab` is the image tokenizer's. `decoding(transformer, contexts,
    candidates, no caption or None, guidance)` draws from it, see `zoo.models.dalle_decoding`. `tokenizer` is needed to
    generate only. `config.guidance` is what `generate` takes where none is asked for.
    """

    config: Any
    transformer: nn.Module
    tokenizer: Any
    decoding: Callable[..., Predict]

    # --- what differs ------------------------------------------------------------------------------------------------
    @property
    @abstractmethod
    def image_tokenizer(self) -> nn.Module:
        """Pictures <-> codes; trained before, and left as it is."""

    @property
    @abstractmethod
    def context_dropout(self) -> float:
        """The part of samples whose context training leaves out, without which guidance has nothing to go away from."""

    @abstractmethod
    def contexts(self, texts: list[str]) -> Tensor:
        """Texts -> what the transformer is told of them, (B, ...), on its device; equal for equal texts."""

    @abstractmethod
    def no_caption(self, like: Tensor) -> Tensor:
        """What stands for no caption beside such contexts (B, ...), (1, ...)."""

    # --- what is alike -----------------------------------------------------------------------------------------------
    def check_parts(self) -> None:
        """Raises SettingsError where the image tokenizer and the transformer do not fit each other."""
        sizes = self.transformer.config
        for what, codes, tokens in (
            ("codes", self.image_tokenizer.vocab, sizes.vocab),
            ("codes per side", self.image_tokenizer.grid, sizes.grid),
        ):
            if codes != tokens:
                raise SettingsError(
                    f"the image tokenizer has {codes} {what} and the transformer {tokens}: it was trained with another"
                )

    @property
    def image_size(self) -> int:
        """The side of the pictures in pixels."""
        return self.image_tokenizer.image_size

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Blocks' activations are computed again in the backward pass."""
        self.transformer.set_grad_checkpointing(enable)

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
        Raises SettingsError, and CaptionTooLong for a prompt of more tokens than the model reads.
        """
        guidance = self.config.guidance if guidance is None else guidance
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance)
        if guidance != 1 and not self.context_dropout:
            logger.warning(
                "guidance=%g, but this model was trained without caption dropout (in CLIP-GEN, condition dropout): it "
                "does not know what a picture of no caption is, and guidance=1 may be better",
                guidance,
            )
        given = None if first_rows is None else self._codes_of(*first_rows)

        def draw(texts: list[str], seeds: list[int]) -> Tensor:
            codes = self.draw(self.contexts(texts), seeds, sampling, given, preview, progress)
            return self.image_tokenizer.decode(codes)

        words = {"candidates": candidates, "rerank": rerank, "batch_size": batch_size, "progress": progress}
        with torch.inference_mode():
            return generate(draw, prompts, n, seed, **words)

    def draw(
        self,
        contexts: Tensor,
        seeds: Sequence[int],
        sampling: Sampling = PLAIN,
        given: Tensor | None = None,
        preview: Callable[[int, Tensor], None] | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Contexts (B, ...) and a seed each -> codes (B, h, w). `given` (g,): codes that each begins with.

        Neighbouring rows of the same context are candidates of one prompt, which is read once for all of them.
        """
        grid, length = self.transformer.config.grid, self.transformer.config.grid**2
        contexts, candidates = prompts_of(contexts)
        without = self.no_caption(contexts) if sampling.guidance != 1 else None
        predict = self.decoding(self.transformer, contexts, candidates, without, sampling.guidance)
        if given is not None:
            given = given.to(contexts.device).expand(len(seeds), -1)

        def on_token(position: int, tokens: Tensor) -> None:
            if preview is not None and (position + 1) % grid == 0:
                preview((position + 1) // grid, self._so_far(tokens))

        numbers = uniforms(seeds, length).to(contexts.device)
        return sample_tokens(predict, numbers, sampling, given, on_token, progress).unflatten(1, (grid, grid))

    def tokenize(self, texts: list[str], length: int) -> Tensor:
        """Texts -> tokens (B, length), where the transformer is. Raises SettingsError without a tokenizer, and
        CaptionTooLong."""
        if self.tokenizer is None:
            raise SettingsError(
                f"generate needs the model's tokenizer: {type(self).__name__}(..., tokenizer=), "
                "or load it by AutoLoader"
            )
        tokens = self.tokenizer.tokenize_as_tensor(texts, context_length=length, truncate="error")
        return tokens.to(self._device)

    @property
    def _device(self) -> torch.device:
        """Where it computes: where its weights are, or where accelerate brings them."""
        hooks = (getattr(module, "_hf_hook", None) for module in self.transformer.modules())
        brought = (hook.execution_device for hook in hooks if getattr(hook, "execution_device", None) is not None)
        return torch.device(next(brought, next(self.transformer.parameters()).device))

    def _so_far(self, tokens: Tensor) -> Tensor:
        """The first codes (B, rows * w) -> pictures, grey below."""
        grid = self.transformer.config.grid
        filled = torch.zeros(len(tokens), grid * grid, dtype=tokens.dtype, device=tokens.device)
        filled[:, : tokens.shape[1]] = tokens
        pictures = self.image_tokenizer.decode(filled.unflatten(1, (grid, grid)))
        drawn = tokens.shape[1] // grid * pictures.shape[2] // grid
        pictures[:, :, drawn:] = 0.5
        return pictures

    def _codes_of(self, picture: Tensor, rows: int) -> Tensor:
        """The codes of the first rows, (rows * w,). Raises SettingsError for a picture of another size."""
        size, grid = self.image_size, self.transformer.config.grid
        if tuple(picture.shape) != (3, size, size):
            raise SettingsError(f"first_rows: a picture (3, {size}, {size}) is needed, this is {tuple(picture.shape)}")
        if not 0 <= rows < grid:
            raise SettingsError(f"first_rows: of {grid} rows of codes {rows} cannot be given: give 0 to {grid - 1}")
        with torch.inference_mode():
            return self.image_tokenizer.encode(picture[None].to(self._device))[0, :rows].flatten()


def prompts_of(contexts: Tensor) -> tuple[Tensor, int]:
    """Rows of contexts (B, ...) -> one for each run of equal rows, (P, ...), and how long the runs are; where they are
    not all equally long, all rows and 1."""
    changes = (contexts[1:] != contexts[:-1]).flatten(1).any(1).nonzero()[:, 0] + 1
    starts = [0, *changes.tolist(), len(contexts)]
    lengths = {end - start for start, end in pairwise(starts)}
    return (contexts[starts[:-1]], lengths.pop()) if len(lengths) == 1 else (contexts, 1)


def partly_others(codes: Tensor, vocab: int, up_to: float) -> Tensor:
    """Codes (B, N), a part of each row replaced by others at random; how large a part is drawn too, from 0 to `up_to`
    (Bowman et al. 2016, 3.1)."""
    part = up_to * torch.rand(len(codes), 1, device=codes.device)
    others = torch.randint_like(codes, vocab)
    return torch.where(torch.rand(codes.shape, device=codes.device) < part, others, codes)
