"""Text towers that tell a UNet of every token: CLIP's (OpenAI's and OpenCLIP's), BERT and XLM-RoBERTa.

B batch, T tokens, D width. Sources: CompVis/stable-diffusion, FrozenCLIPEmbedder; Stability-AI/stablediffusion,
FrozenOpenCLIPEmbedder; BAAI/AltDiffusion; IDEA-CCNL/Taiyi-Stable-Diffusion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.blocks.transformer import Transformer
from zoo.errors import SettingsError
from zoo.models.clip import TextConfig
from zoo.models.clip_bert import BertBlock, BertConfig


class ClipTextEncoder(nn.Module):
    """CLIP's text tower before its projection. Stable Diffusion 2 has OpenCLIP's without its last block, as published.
    Padding is read like any token, so what pads matters: the end token for OpenAI's, 0 for OpenCLIP's."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Parameter(torch.empty(config.context, config.width))
        self.transformer = Transformer(
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            activation=config.activation,
            causal=True,
        )
        self.norm_out = nn.LayerNorm(config.width)
        nn.init.normal_(self.positions, std=0.01)

    @property
    def width(self) -> int:
        """Numbers of the context for each token."""
        return self.config.width

    def forward(self, tokens: Tensor, skip: int = 0) -> Tensor:
        """Tokens (B, T) -> context (B, T, D), normed. `skip`: so many of the last blocks are left out ("clip skip").

        Raises SettingsError for more tokens than positions, or as many blocks to skip as there are.
        """
        length, depth = tokens.shape[1], self.config.depth
        if length > self.config.context:
            raise SettingsError(f"{length} tokens, and this text tower reads {self.config.context}: cut into windows")
        if not 0 <= skip < depth:
            raise SettingsError(f"skip={skip}: this text tower has {depth} blocks; give 0 to {depth - 1}")
        x = self.embed(tokens) + self.positions[:length]  # (B, T, D)
        for block in self.transformer.blocks[: depth - skip]:
            x = block(x)
        return self.norm_out(x)


@dataclass(frozen=True, kw_only=True)
class BertTextConfig(BertConfig):
    """A bidirectional tower. `penultimate`: the last block is left out, as in AltDiffusion-m18; `norm`: a norm before
    the `bridge`, which is then a linear layer to that width; `masked`: padding is not read."""

    penultimate: bool = False
    norm: bool = False
    masked: bool = True


class BertTextEncoder(nn.Module):
    """BERT, or XLM-RoBERTa with a linear layer to the width that the UNet reads."""

    def __init__(self, config: BertTextConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.embed = nn.Embedding(config.vocab, width)
        self.positions = nn.Embedding(config.positions, width)
        self.types = nn.Embedding(config.types, width)
        self.norm_in = nn.LayerNorm(width, config.eps)
        self.blocks = nn.ModuleList(BertBlock(config) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(width, config.eps) if config.norm else nn.Identity()
        self.bridge = nn.Linear(width, config.bridge) if config.bridge else nn.Identity()

    @property
    def width(self) -> int:
        """Numbers of the context for each token."""
        return self.config.bridge or self.config.width

    def forward(self, tokens: Tensor, skip: int = 0) -> Tensor:
        """Tokens (B, T), padded at their ends -> context (B, T, D). `skip`: so many of the last blocks are left out."""
        config = self.config
        depth = config.depth - config.penultimate - skip
        if depth < 1:
            raise SettingsError(f"skip={skip}: this text tower has {config.depth} blocks")
        mask = (tokens != config.pad)[:, None, None] if config.masked else None
        places = torch.arange(tokens.shape[1], device=tokens.device) + config.first_position
        # XLM-RoBERTa gives padding the place of its padding's row.
        places = torch.where(tokens == config.pad, config.pad, places) if config.first_position else places
        x = self.norm_in(self.embed(tokens) + self.positions(places) + self.types.weight[0])  # (B, T, D)
        for block in self.blocks[:depth]:
            x = block(x, mask)
        return self.bridge(self.norm_out(x))


def text_config(sizes: Mapping) -> TextConfig | BertTextConfig:
    """The config that `dataclasses.asdict` says. Unknown names raise TypeError."""
    return (BertTextConfig if "pad" in sizes else TextConfig)(**sizes)


def build_text(config: TextConfig | BertTextConfig) -> ClipTextEncoder | BertTextEncoder:
    """The tower of that config."""
    return (BertTextEncoder if isinstance(config, BertTextConfig) else ClipTextEncoder)(config)


def text_of(clip: nn.Module) -> ClipTextEncoder | BertTextEncoder:
    """The text tower of a CLIP, with its weights, without its projection."""
    tower, state = build_text(clip.config.text), clip.text.state_dict()
    tower.load_state_dict({name: state[name] for name in tower.state_dict()})
    return tower
