"""The text towers of Chinese-CLIP (BERT) and AltCLIP (XLM-RoBERTa). B batch, T tokens, D width, E embedding.

Facts: OFA-Sys/Chinese-CLIP, cn_clip/clip/model.py; BAAI/AltCLIP as in transformers, models/altclip. Written out here
rather than taken from transformers, whose towers change their tensor names between versions and keep buffers that no
weights file holds. Dropout, which both had in training, is left out.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.blocks.recompute import recompute
from zoo.blocks.transformer import Attention, Mlp


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Sizes of a bidirectional text tower. The defaults are Chinese-CLIP's base model.

    `positions`: rows of the position table, of which the first token takes `first_position`: XLM-RoBERTa counts from
    the row after its padding's. `bridge`: AltCLIP's norm and linear layer to this width before the projection.
    """

    context: int = 52
    vocab: int = 21128
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    eps: float = 1e-12
    positions: int = 512
    first_position: int = 0
    types: int = 2
    pad: int = 0
    bridge: int | None = None


class BertBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + mlp(x))."""

    def __init__(self, config: BertConfig):
        super().__init__()
        width = config.width
        self.attention = Attention(width, config.heads)
        self.norm1 = nn.LayerNorm(width, config.eps)
        self.mlp = Mlp(width, round(width * config.mlp_ratio), config.activation)
        self.norm2 = nn.LayerNorm(width, config.eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, D), and a mask (B, 1, 1, T) that is true where there is a token -> (B, T, D)."""
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.mlp(x))


class BertTransformer(nn.Module):
    """A bidirectional transformer; what stands at the first token is the caption's embedding."""

    def __init__(self, config: BertConfig, embed: int):
        super().__init__()
        width = config.width
        self.pad, self.first_position = config.pad, config.first_position
        self.embed = nn.Embedding(config.vocab, width)
        self.positions = nn.Embedding(config.positions, width)
        self.types = nn.Embedding(config.types, width)
        self.norm_in = nn.LayerNorm(width, config.eps)
        self.blocks = nn.ModuleList(BertBlock(config) for _ in range(config.depth))
        self.bridge: nn.Module = nn.Identity()
        if config.bridge:
            parts = OrderedDict(norm=nn.LayerNorm(width, config.eps), linear=nn.Linear(width, config.bridge))
            self.bridge = nn.Sequential(parts)
        self.project = nn.Linear(config.bridge or width, embed, bias=False)
        self.checkpointing = False
        self.init_weights()

    def init_weights(self) -> None:
        """As published for BERT: all matrices from a normal distribution of 0.02, biases zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def groups(self) -> list[nn.Module]:
        """The parts in the order in which they are unlocked from the end."""
        first = nn.ModuleList([self.embed, self.positions, self.types, self.norm_in])
        return [first, *self.blocks, nn.ModuleList([self.bridge, self.project])]

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T), padded at their ends -> embeddings (B, E). Nothing after the batch's longest caption is
        computed: padding is masked, so it could change nothing."""
        mask = tokens != self.pad
        longest = max(1, int(mask.sum(1).max()))
        tokens, mask = tokens[:, :longest], mask[:, None, None, :longest]
        # Places count from the front, padding or not: what stands at padding is never read.
        places = torch.arange(longest, device=tokens.device) + self.first_position
        x = self.norm_in(self.embed(tokens) + self.positions(places) + self.types.weight[0])  # (B, T, D)
        for block in self.blocks:
            x = recompute(block, x, mask) if self.checkpointing and self.training else block(x, mask)
        return self.project(self.bridge(x[:, 0]))
