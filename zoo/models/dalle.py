"""DALL-E: an image tokenizer and a transformer over a caption and the picture's codes (Ramesh et al. 2021).

B samples, T text tokens, h w the grid of codes, N = h * w, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from zoo.generation.tokens import Predict
from zoo.models.dalle_decoding import Decoding
from zoo.models.dalle_transformer import DalleTransformer, TransformerConfig
from zoo.models.dvae import Dvae, DvaeConfig
from zoo.models.painter import Painter, partly_others
from zoo.models.painter import prompts_of as prompts_of
from zoo.models.vqgan import Vqgan, VqganConfig


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


class Dalle(Painter):
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
        self.check_parts()

    @property
    def image_tokenizer(self) -> nn.Module:
        """The dVAE or VQGAN."""
        return self.dvae

    @property
    def context_dropout(self) -> float:
        """The part of captions that training leaves out."""
        return self.config.caption_dropout

    def train(self, mode: bool = True) -> Dalle:
        """The image tokenizer stays in evaluation mode."""
        super().train(mode)
        self.dvae.eval()
        return self

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
            seen = partly_others(codes, self.dvae.vocab, self.config.code_dropout)
        return self.transformer(text, codes, seen)

    def contexts(self, texts: list[str]) -> Tensor:
        """Texts -> tokens (B, T). Raises SettingsError without a tokenizer, and CaptionTooLong."""
        return self.tokenize(texts, self.transformer.config.text_length)

    def no_caption(self, like: Tensor) -> Tensor:
        """The tokens (1, T) that stand for no caption beside such tokens (B, T)."""
        without = torch.full_like(like[:1], self.transformer.config.pad)
        without[0, : len(self.config.empty)] = like.new_tensor(self.config.empty)
        return without
