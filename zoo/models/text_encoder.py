"""Text towers that tell a UNet of every token: CLIP's (OpenAI's and OpenCLIP's), BERT and XLM-RoBERTa, and the one that
latent diffusion trained together with its UNet.

B batch, T tokens, D width. Sources: CompVis/stable-diffusion, FrozenCLIPEmbedder; Stability-AI/stablediffusion,
FrozenOpenCLIPEmbedder; BAAI/AltDiffusion; IDEA-CCNL/Taiyi-Stable-Diffusion; CompVis/latent-diffusion, BERTEmbedder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.blocks.recompute import recompute
from zoo.blocks.transformer import Block, Transformer
from zoo.errors import SettingsError
from zoo.models.clip import TextConfig
from zoo.models.clip_bert import BertBlock, BertConfig


class TokenReader(nn.Module):
    """What the towers that read padding like any token have alike: `embed`, `positions`, `blocks` and `norm_out`."""

    checkpointing = False

    def __init__(self, config: TextConfig | LdmTextConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Parameter(torch.empty(config.context, config.width))
        self.norm_out = nn.LayerNorm(config.width)

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
        return self.norm_out(_through(self, self.blocks[: depth - skip], x))


class ClipTextEncoder(TokenReader):
    """CLIP's text tower before its projection. Stable Diffusion 2 has OpenCLIP's without its last block, as published.
    Padding is read like any token, so what pads matters: the end token for OpenAI's, 0 for OpenCLIP's."""

    def __init__(self, config: TextConfig):
        super().__init__(config)
        self.transformer = Transformer(
            width=config.width,
            depth=config.depth,
            heads=config.heads,
            mlp_ratio=config.mlp_ratio,
            activation=config.activation,
            causal=True,
        )
        nn.init.normal_(self.positions, std=0.01)

    @property
    def blocks(self) -> nn.ModuleList:
        """Those of the transformer."""
        return self.transformer.blocks


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
        self.checkpointing = False

    def requires_grad_(self, requires_grad: bool = True) -> BertTextEncoder:
        """Without a last block that is left out: DDP waits for the gradient of all that is trained."""
        super().requires_grad_(requires_grad)
        if self.config.penultimate:
            self.blocks[-1].requires_grad_(False)
        return self

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
        return self.bridge(self.norm_out(_through(self, self.blocks[:depth], x, mask)))


@dataclass(frozen=True, kw_only=True)
class LdmTextConfig:
    """Sizes of latent diffusion's own tower; the defaults are those of its largest model. Heads are of `head_width`,
    whatever the width of the tokens."""

    context: int = 77
    vocab: int = 30522  # of bert-base-uncased
    width: int = 1280
    depth: int = 32
    heads: int = 8
    head_width: int = 64
    mlp_ratio: float = 4.0


class LdmBlock(Block):
    """A block whose heads together are not as wide as its tokens; queries, keys and values have no bias."""

    def __init__(self, config: LdmTextConfig):
        super().__init__(config.width, config.heads, config.mlp_ratio, "gelu", causal=False)
        inner = config.heads * config.head_width
        self.attention.qkv = nn.Linear(config.width, 3 * inner, bias=False)
        self.attention.out = nn.Linear(inner, config.width)


class LdmTextEncoder(TokenReader):
    """The transformer that latent diffusion trained together with its UNet; only its tokens are BERT's. It looks both
    ways."""

    def __init__(self, config: LdmTextConfig):
        super().__init__(config)
        self.blocks = nn.ModuleList(LdmBlock(config) for _ in range(config.depth))
        for parameter in (self.embed.weight, self.positions):
            nn.init.normal_(parameter, std=0.02)  # as published; it was trained from nothing


def _through(tower: nn.Module, blocks: nn.ModuleList, x: Tensor, *mask: Tensor | None) -> Tensor:
    """(B, T, D) -> (B, T, D), activations computed again in the backward pass where `checkpointing` is set."""
    for block in blocks:
        x = recompute(block, x, *mask) if tower.checkpointing and tower.training else block(x, *mask)
    return x


TowerConfig = TextConfig | BertTextConfig | LdmTextConfig
Tower = ClipTextEncoder | BertTextEncoder | LdmTextEncoder
# Each kind of config by a field that it alone has; CLIP's has none.
MARKS = {"pad": BertTextConfig, "head_width": LdmTextConfig}
TOWERS = {TextConfig: ClipTextEncoder, BertTextConfig: BertTextEncoder, LdmTextConfig: LdmTextEncoder}


def text_config(sizes: Mapping) -> TowerConfig:
    """The config that `dataclasses.asdict` says. Unknown names raise TypeError."""
    return next((kind for mark, kind in MARKS.items() if mark in sizes), TextConfig)(**sizes)


def build_text(config: TowerConfig) -> Tower:
    """The tower of that config."""
    return TOWERS[type(config)](config)


def text_of(clip: nn.Module) -> Tower:
    """The text tower of a CLIP, with its weights, without its projection."""
    tower, state = build_text(clip.config.text), clip.text.state_dict()
    tower.load_state_dict({name: state[name] for name in tower.state_dict()})
    return tower
