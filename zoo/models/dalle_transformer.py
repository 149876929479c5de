"""DALL-E's transformer: one stream of text tokens and image tokens (Ramesh et al. 2021, section 2.2, appendix B).

B sequences, T text tokens, N = grid * grid image tokens in raster order, D width, H heads, d width of a head. Each
token's output predicts the next one, so that the last text token's predicts the first of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks.grid_attention import attend, paper_patterns
from zoo.blocks.recompute import recompute
from zoo.blocks.transformer import Mlp
from zoo.errors import SettingsError

Gather = Callable[[Tensor, Tensor, Tensor], Tensor]  # queries, keys, values (B, H, T, d) -> (B, H, T, d)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """Sizes; as they stand, the paper's 12 billion. What differs between the published ones of this kind:

    `attention`: "sparse", the paper's patterns, or "full"; `conv`: how the last layer's window wraps, see
    `zoo.blocks.grid_attention`. `pads`: an own learned embedding for the padding of each text position (paper), or
    padding is a symbol like others. `positions`: of image tokens, "axial" (row + column) or "flat" (one each).
    `norm`: "pre", or "sandwich" (after attention and MLP too; CogView, ruDALL-E). `head_norm`, `head_bias`: of the two
    output layers. `pad` is the tokenizer's padding.
    """

    text_vocab: int = 16384
    text_length: int = 256
    vocab: int = 8192
    grid: int = 32
    width: int = 3968
    depth: int = 64
    heads: int = 62
    attention: str = "sparse"
    conv: str = "conv"
    kernel: int = 11
    pads: bool = True
    pad: int = 0
    positions: str = "axial"
    norm: str = "pre"
    activation: str = "gelu"
    head_norm: bool = False
    head_bias: bool = False
    text_weight: float = 1 / 8

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise SettingsError(f"a width of {self.width} cannot be cut into {self.heads} heads: choose a multiple")
        for name, known in (("attention", ("sparse", "full")), ("positions", ("axial", "flat"))):
            if getattr(self, name) not in known:
                raise SettingsError(f"{name}={getattr(self, name)!r}: choose {' or '.join(known)}")

    @property
    def patterns(self) -> tuple[str, ...]:
        """The attention pattern of each layer."""
        return paper_patterns(self.depth, self.conv) if self.attention == "sparse" else ("full",) * self.depth

    @classmethod
    def from_dict(cls, sizes: Mapping) -> TransformerConfig:
        """The config that `dataclasses.asdict`, and so a config.json, says. Unknown names raise TypeError."""
        return cls(**sizes)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); in the sandwich form, both are normalised again before adding."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        width, sandwich = config.width, config.norm == "sandwich"
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.after1 = nn.LayerNorm(width) if sandwich else nn.Identity()
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width, config.activation)
        self.after2 = nn.LayerNorm(width) if sandwich else nn.Identity()

    def forward(self, x: Tensor, gather: Gather) -> Tensor:
        """(B, T, D) -> (B, T, D). `gather` is the attention itself: what is looked at, and what is kept of it."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, T, d)
        x = x + self.after1(self.out(gather(q, k, v).transpose(1, 2).flatten(2)))
        return x + self.after2(self.mlp(self.norm2(x)))


def init_stream(transformer: nn.Module, blocks: nn.ModuleList) -> None:
    """Normal of 0.02; what its blocks add to the stream is smaller by the root of how often that is (GPT-2, GPT-3)."""
    for module in transformer.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    for block in blocks:
        for layer in (block.out, block.mlp.down):
            nn.init.normal_(layer.weight, std=0.02 * (2 * len(blocks)) ** -0.5)


class DalleTransformer(nn.Module):
    """Text and image tokens -> the distribution of each next one."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        width, length = config.width, config.text_length
        self.text = nn.Embedding(config.text_vocab + (length if config.pads else 0), width)
        self.text_positions = nn.Embedding(length, width)
        self.image = nn.Embedding(config.vocab, width)
        if config.positions == "axial":
            self.rows, self.columns = nn.Embedding(config.grid, width), nn.Embedding(config.grid, width)
        else:
            self.places = nn.Embedding(config.grid**2, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.head_norm = nn.LayerNorm(width) if config.head_norm else nn.Identity()
        self.text_head = nn.Linear(width, config.text_vocab, bias=config.head_bias)
        self.image_head = nn.Linear(width, config.vocab, bias=config.head_bias)
        self.checkpointing = False
        self.init_weights()

    def init_weights(self) -> None:
        """Normal of 0.02; what is added to the stream is smaller by the root of how often that is (GPT-2, GPT-3)."""
        init_stream(self, self.blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Blocks' activations are computed again in the backward pass."""
        self.checkpointing = enable

    def embed_text(self, text: Tensor) -> Tensor:
        """Tokens (B, T) as the tokenizer gives them -> (B, T, D)."""
        place = torch.arange(text.shape[1], device=text.device)
        if self.config.pads:
            text = torch.where(text == self.config.pad, self.config.text_vocab + place, text)
        return self.text(text) + self.text_positions(place)

    def embed_image(self, codes: Tensor, place: Tensor) -> Tensor:
        """Codes (B, n) at the places (n,) of the grid -> (B, n, D)."""
        if self.config.positions == "flat":
            return self.image(codes) + self.places(place)
        return self.image(codes) + self.rows(place // self.config.grid) + self.columns(place % self.config.grid)

    def features(self, text: Tensor, codes: Tensor) -> Tensor:
        """Text tokens (B, T) and codes (B, N) -> what the output layers read, (B, T + N, D)."""
        config = self.config
        place = torch.arange(codes.shape[1], device=codes.device)
        x = torch.cat([self.embed_text(text), self.embed_image(codes, place)], 1)
        for block, pattern in zip(self.blocks, config.patterns, strict=True):
            gather = partial(attend, pattern=pattern, text=text.shape[1], grid=config.grid, kernel=config.kernel)
            if self.checkpointing and self.training:
                x = recompute(block, x, call=partial(block, gather=gather))
            else:
                x = block(x, gather)
        return self.head_norm(self.norm(x))

    def logits(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Text tokens (B, T) and codes (B, N) -> logits of text tokens 1.. (B, T - 1, text V), of codes (B, N, V)."""
        x = self.features(text, codes)
        last = text.shape[1] - 1
        return self.text_head(x[:, :last]), self.image_head(x[:, last:-1])

    def forward(self, text: Tensor, codes: Tensor, seen: Tensor | None = None) -> dict[str, Tensor]:
        """Text tokens (B, T) and codes (B, N) -> "loss", and its two parts "text" and "image", in nats per token.

        `seen` (B, N): what is read in place of `codes`, which are predicted all the same.
        The paper's weights: 1/8 for the text's, 7/8 for the image's. Padding is a token that is predicted as others.
        """
        text_logits, image_logits = self.logits(text, codes if seen is None else seen)
        text_loss = F.cross_entropy(text_logits.flatten(0, 1).float(), text[:, 1:].flatten())
        image_loss = F.cross_entropy(image_logits.flatten(0, 1).float(), codes.flatten())
        weight = self.config.text_weight
        return {"loss": weight * text_loss + (1 - weight) * image_loss, "text": text_loss, "image": image_loss}
