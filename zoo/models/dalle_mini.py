"""DALL-E mini and mega (Dayma et al. 2021; borisdayma/dalle-mini): a DALL-E whose transformer is BART. An encoder reads
the caption, a decoder writes the codes one by one, and a VQGAN makes the picture of them.

B batch, T text tokens, N codes, D width, V rows of the codes' table; P prompts, C candidates of each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.generation.tokens import guide
from zoo.models.dalle import Dalle
from zoo.models.dalle_mini_bart import BartConfig, Decoder, Encoder
from zoo.models.vqgan import Vqgan, VqganConfig


@dataclass(frozen=True, kw_only=True)
class DalleMiniConfig:
    """What `DalleConfig` says, of these parts. `empty` are the two ends of a caption; the published guidance is 10, and
    training emptied 10 to 20% of the captions."""

    image: VqganConfig = field(default_factory=lambda: VqganConfig(black=0.0))
    transformer: BartConfig = field(default_factory=BartConfig)
    caption_dropout: float = 0.1
    code_dropout: float = 0.0
    empty: tuple[int, ...] = (0, 2)
    guidance: float = 10.0

    @classmethod
    def from_dict(cls, sizes: Mapping) -> DalleMiniConfig:
        """The config that `dataclasses.asdict`, and so a config.json, says. Unknown names raise TypeError."""
        parts = {"image": VqganConfig.from_dict, "transformer": BartConfig.from_dict, "empty": tuple}
        return cls(**{name: parts[name](v) if name in parts else v for name, v in sizes.items()})


def dalle_mini(config: DalleMiniConfig, tokenizer: Any = None) -> Dalle:
    """A whole DALL-E mini. Raises SettingsError when the parts do not fit each other."""
    return Dalle(config, Vqgan(config.image), DalleMiniTransformer(config.transformer), tokenizer, DalleMiniDecoding)


class DalleMiniTransformer(nn.Module):
    """Captions and the codes so far -> the distribution of each next code."""

    def __init__(self, config: BartConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.init_weights()

    def init_weights(self) -> None:
        """All matrices from N(0, init_std), as published."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.init_std)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Blocks' activations are computed again in the backward pass."""
        self.encoder.checkpointing = self.decoder.checkpointing = enable

    def mask(self, text: Tensor) -> Tensor:
        """Text tokens (B, T) -> (B, 1, 1, T), false at padding, which nothing looks at."""
        return (text != self.config.pad)[:, None, None]

    def logits(self, text: Tensor, codes: Tensor) -> Tensor:
        """Text tokens (B, T) and codes (B, N) -> logits (B, N, V) of each code, by those before it."""
        mask = self.mask(text)
        before = F.pad(codes[:, :-1], (1, 0), value=self.config.start)
        return self.decoder(before, self.encoder(text, mask), mask)

    def forward(self, text: Tensor, codes: Tensor, seen: Tensor | None = None) -> dict[str, Tensor]:
        """Text tokens (B, T) and codes (B, N) -> "loss": nats per code, over all rows of the table as published. `seen`
        (B, N): what is read in place of `codes`."""
        logits = self.logits(text, codes if seen is None else seen)
        return {"loss": F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())}


class DalleMiniDecoding:
    """What `zoo.generation.tokens.sample_tokens` asks for the next code's logits, for C candidates of each prompt.

    As `zoo.models.dalle_decoding.Decoding`: `text` (P, T), of which each prompt is read once, and `without` (1, T), the
    text that stands for no prompt; with it, each row is written twice in one pass, and logits are guided by `scale`
    (super conditioning: Katherine Crowson, 2022). Rows are in the order of prompts, a prompt's candidates together.
    """

    def __init__(
        self,
        model: DalleMiniTransformer,
        text: Tensor,
        candidates: int = 1,
        without: Tensor | None = None,
        scale: float = 1.0,
    ):
        self.model, self.scale = model, scale
        captions = list(range(len(text)))
        self.copies = 1 if without is None else 2
        if without is not None:
            captions += [len(text)] * len(text)
            text = torch.cat([text, without])
        mask = model.mask(text)
        rows = len(captions) * candidates
        self.memories = model.decoder.begin(model.encoder(text, mask), mask, captions, rows)
        self.first = text.new_full((rows // self.copies,), model.config.start)
        self.places = torch.arange(model.config.grid**2, device=text.device)

    def __call__(self, tokens: Tensor | None, position: int) -> Tensor:
        """Logits (P * C, codes) of the code at `position`, after `tokens` (P * C,) at the one before it."""
        before = (self.first if tokens is None else tokens).repeat(self.copies)
        logits = self.model.decoder.step(before, self.places[position : position + 1], self.memories)
        logits = logits[:, : self.model.config.vocab].float()  # the rest of the rows are no codes
        return logits if self.copies == 1 else guide(*logits.chunk(2), self.scale)
