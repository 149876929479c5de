"""CLIP-GEN's transformer: a picture's codes after its CLIP embedding (Wang et al. 2022; models/gpt.py of HFAiLab).

B sequences, E width of the embedding, N = grid * grid codes in raster order, D width, V codes. What stands before the
codes is one token, the projected embedding; each token's output predicts the next code, so that the last code is
never read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks.recompute import recompute
from zoo.errors import SettingsError
from zoo.models.dalle_transformer import Block, init_stream


@dataclass(frozen=True, kw_only=True)
class ClipGenTransformerConfig:
    """Sizes; as they stand, those published as gpt2_medium. `embed`: the width of CLIP's embeddings. `dropout`, in
    training: of attention's weights and output, and within and after the MLP, where torch's TransformerEncoderLayer,
    which the release trains, has it; 0.1 there.
    """

    norm: ClassVar[str] = "pre"  # of Block
    activation: ClassVar[str] = "gelu"

    embed: int = 512
    vocab: int = 16384
    grid: int = 16
    width: int = 1024
    depth: int = 24
    heads: int = 16
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise SettingsError(f"a width of {self.width} cannot be cut into {self.heads} heads: choose a multiple")
        if not 0 <= self.dropout < 1:
            raise SettingsError(f"dropout={self.dropout!r}: give 0, for none, or a part below 1")

    @property
    def patterns(self) -> tuple[str, ...]:
        """The attention pattern of each layer, as `zoo.models.dalle_decoding` asks for it."""
        return ("full",) * self.depth

    @classmethod
    def from_dict(cls, sizes: Mapping) -> ClipGenTransformerConfig:
        """The config that `dataclasses.asdict`, and so a config.json, says. Unknown names raise TypeError."""
        return cls(**sizes)


class DropoutBlock(Block):
    """DALL-E's block with dropout: after attention, and within and after the MLP."""

    def __init__(self, config: ClipGenTransformerConfig):
        super().__init__(config)
        self.after1, self.after2 = nn.Dropout(config.dropout), nn.Dropout(config.dropout)
        self.mlp.activation = nn.Sequential(nn.GELU(), nn.Dropout(config.dropout))


class ClipGenTransformer(nn.Module):
    """A CLIP embedding and the codes so far -> the distribution of each next code."""

    def __init__(self, config: ClipGenTransformerConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.context = nn.Linear(config.embed, width)
        self.image = nn.Embedding(config.vocab, width)
        self.positions = nn.Embedding(config.grid**2, width)  # the first is the embedding's
        self.blocks = nn.ModuleList(DropoutBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.head_norm = nn.Identity()  # `zoo.models.dalle_decoding` asks for it
        self.image_head = nn.Linear(width, config.vocab)
        self.checkpointing = False
        self.init_weights()

    def init_weights(self) -> None:
        """As DALL-E's: normal of 0.02, smaller where it is added to the stream. The release left torch's own, so that
        codes began with a spread of 1, and positions with 0."""
        init_stream(self, self.blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Blocks' activations are computed again in the backward pass."""
        self.checkpointing = enable

    def embed_text(self, context: Tensor) -> Tensor:
        """Embeddings (B, E), of a picture or a text -> (B, 1, D)."""
        place = torch.zeros(1, dtype=torch.int64, device=context.device)
        return (self.context(context.to(self.context.weight.dtype)) + self.positions(place))[:, None]

    def embed_image(self, codes: Tensor, place: Tensor) -> Tensor:
        """Codes (B, n) at the places (n,) of the grid -> (B, n, D)."""
        return self.image(codes) + self.positions(place + 1)

    def logits(self, context: Tensor, codes: Tensor) -> Tensor:
        """Embeddings (B, E) and codes (B, N) -> logits (B, N, V) of each code, by those before it."""
        place = torch.arange(codes.shape[1] - 1, device=codes.device)
        x = torch.cat([self.embed_text(context), self.embed_image(codes[:, :-1], place)], 1)
        gather = partial(
            F.scaled_dot_product_attention, is_causal=True, dropout_p=self.config.dropout if self.training else 0.0
        )
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = recompute(block, x, call=partial(block, gather=gather))
            else:
                x = block(x, gather)
        return self.image_head(self.head_norm(self.norm(x)))

    def forward(self, context: Tensor, codes: Tensor, seen: Tensor | None = None) -> dict[str, Tensor]:
        """Embeddings (B, E) and codes (B, N) -> "loss", in nats per code, and "logits" (B, N, V).

        `seen` (B, N): what is read in place of `codes`, which are predicted all the same.
        """
        logits = self.logits(context, codes if seen is None else seen)
        return {"loss": F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten()), "logits": logits}
