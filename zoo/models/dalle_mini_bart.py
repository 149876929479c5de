"""The transformer of DALL-E mini and mega: BART (Lewis et al. 2019) with the norms of NormFormer (Shleifer et al.
2021), gated feed-forward layers (Shazeer 2020) and linear layers without bias. Facts: borisdayma/dalle-mini.

B batch, T text tokens, N = grid * grid codes in raster order, D width, H heads, d = D / H, V rows of the codes' table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks.recompute import recompute
from zoo.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class BartConfig:
    """Sizes; as they stand, DALL-E mini's. Both halves have the same `width`, `depth` and `heads`, and `hidden`
    channels within the gated layers.

    The encoder reads `text_length` tokens, filled up with `pad`. Of the `rows` of the codes' table the first `vocab`
    are codes, `start` stands before the first code, and some were never used.
    """

    text_vocab: int = 50264
    text_length: int = 64
    pad: int = 1
    vocab: int = 16384
    rows: int = 16385
    start: int = 16384
    grid: int = 16
    width: int = 1024
    depth: int = 12
    heads: int = 16
    hidden: int = 2730
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise SettingsError(f"a width of {self.width} cannot be cut into {self.heads} heads: choose a multiple")

    @classmethod
    def from_dict(cls, sizes: Mapping) -> BartConfig:
        """The config that `dataclasses.asdict`, and so a config.json, says. Unknown names raise TypeError."""
        return cls(**sizes)


class Shift(nn.Module):
    """A layer norm with a bias and no gain: the linear layer after it has one."""

    def __init__(self, width: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return F.layer_norm(x, self.bias.shape, None, self.bias)


def by_heads(x: Tensor, count: int, heads: int) -> Tensor:
    """(B, N, count * D) -> (count, B, H, N, d)."""
    return x.unflatten(-1, (count, heads, -1)).permute(2, 0, 3, 1, 4)


class Attention(nn.Module):
    """Self-attention, with one matrix product for queries, keys and values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """(B, N, D) -> (B, N, D). `mask`: broadcast to (B, H, N, N), true where a token may look; not with causal."""
        q, k, v = by_heads(self.qkv(x), 3, self.heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out(x.transpose(1, 2).flatten(2))

    def step(self, x: Tensor, position: Tensor, cache: Tensor, mask: Tensor) -> Tensor:
        """One code of each row (B, 1, D) -> (B, 1, D). Its key and value are put into the cache (2, B, H, N, d)."""
        qkv = by_heads(self.qkv(x), 3, self.heads)
        cache.index_copy_(3, position, qkv[1:])
        x = F.scaled_dot_product_attention(qkv[0], cache[0], cache[1], attn_mask=mask)
        return self.out(x.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Codes look at a caption, whose keys and values are made once."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def keys_and_values(self, context: Tensor) -> Tensor:
        """(B, T, D) -> (2, B, H, T, d)."""
        return by_heads(self.kv(context), 2, self.heads)

    def forward(self, x: Tensor, keys_and_values: Tensor, mask: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D). `mask`: (B, 1, 1, T), true at the caption's tokens, false at its padding."""
        (q,) = by_heads(self.q(x), 1, self.heads)
        k, v = keys_and_values
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(x.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """The feed-forward layer: down(norm(gelu(a x) * (b x))), a and b being the halves of one matrix."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm_in = Shift(width)
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.norm_hidden = Shift(hidden)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        gate, value = self.up(self.norm_in(x)).chunk(2, -1)
        return self.down(self.norm_hidden(F.gelu(gate) * value))


class EncoderBlock(nn.Module):
    def __init__(self, config: BartConfig):
        super().__init__()
        self.norm_in = Shift(config.width)
        self.attention = Attention(config.width, config.heads)
        self.norm_out = nn.LayerNorm(config.width)
        self.gated = Gated(config.width, config.hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.norm_out(self.attention(self.norm_in(x), mask))
        return x + self.gated(x)


class DecoderBlock(nn.Module):
    def __init__(self, config: BartConfig):
        super().__init__()
        self.norm_in = Shift(config.width)
        self.attention = Attention(config.width, config.heads)
        self.norm_out = nn.LayerNorm(config.width)
        self.cross_norm_in = Shift(config.width)
        self.cross = CrossAttention(config.width, config.heads)
        self.cross_norm_out = nn.LayerNorm(config.width)
        self.gated = Gated(config.width, config.hidden)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        x = x + self.norm_out(self.attention(self.norm_in(x), causal=True))
        x = x + self.cross_norm_out(self.cross(self.cross_norm_in(x), self.cross.keys_and_values(context), mask))
        return x + self.gated(x)

    def step(self, x: Tensor, position: Tensor, memory: Memory, seen: Tensor) -> Tensor:
        """One code of each row (B, 1, D) -> (B, 1, D)."""
        x = x + self.norm_out(self.attention.step(self.norm_in(x), position, memory.own, seen))
        # The rows that share a caption are the queries of one attention: (B, 1, D) seen as (captions, B / captions, D).
        queries = self.cross_norm_in(x).unflatten(0, (len(memory.mask), -1))[:, :, 0]
        x = x + self.cross_norm_out(self.cross(queries, memory.context, memory.mask)).reshape(x.shape)
        return x + self.gated(x)


@dataclass(frozen=True)
class Memory:
    """What a decoder block keeps while it writes: keys and values of the codes so far, `own` (2, B, H, N, d), and of C
    captions, `context` (2, C, H, T, d), each of them for B / C rows, with their `mask` (C, 1, 1, T)."""

    own: Tensor
    context: Tensor
    mask: Tensor


class Encoder(nn.Module):
    def __init__(self, config: BartConfig):
        super().__init__()
        self.embed = nn.Embedding(config.text_vocab, config.width)
        self.positions = nn.Embedding(config.text_length, config.width)
        self.norm_in = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.depth))
        self.norm_out = Shift(config.width)
        self.checkpointing = False

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Tokens (B, T) and their mask (B, 1, 1, T) -> context (B, T, D)."""
        x = self.norm_in(self.embed(tokens) + self.positions.weight[: tokens.shape[1]])  # (B, T, D)
        for block in self.blocks:
            x = recompute(block, x, mask) if self.checkpointing and self.training else block(x, mask)
        return self.norm_out(x)


class Decoder(nn.Module):
    def __init__(self, config: BartConfig):
        super().__init__()
        self.heads = config.heads
        self.embed = nn.Embedding(config.rows, config.width)
        self.positions = nn.Embedding(config.grid**2, config.width)
        self.norm_in = nn.LayerNorm(config.width)
        self.blocks = nn.ModuleList(DecoderBlock(config) for _ in range(config.depth))
        self.norm_out = Shift(config.width)
        self.head = nn.Linear(config.width, config.rows, bias=False)
        self.checkpointing = False

    def forward(self, codes: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        """The codes before each position (B, N), context (B, T, D) and its mask (B, 1, 1, T) -> logits (B, N, V)."""
        x = self.norm_in(self.embed(codes) + self.positions.weight[: codes.shape[1]])  # (B, N, D)
        for block in self.blocks:
            again = self.checkpointing and self.training
            x = recompute(block, x, context, mask) if again else block(x, context, mask)
        return self.head(self.norm_out(x))

    def begin(self, context: Tensor, mask: Tensor, captions: Sequence[int], rows: int) -> list[Memory]:
        """What `step` needs to write `rows` sequences, of which each of `captions`, places in context (B, T, D), gets
        an equal share, in order."""
        chosen = torch.tensor(captions, device=context.device)
        own = (2, rows, self.heads, self.positions.num_embeddings, context.shape[-1] // self.heads)
        return [
            Memory(context.new_zeros(own), block.cross.keys_and_values(context)[:, chosen], mask[chosen])
            for block in self.blocks
        ]

    def step(self, codes: Tensor, position: Tensor, memories: list[Memory]) -> Tensor:
        """The code of each row (B,) before `position` (1,) -> logits (B, V) of that at it."""
        x = self.norm_in(self.embed(codes) + self.positions(position))[:, None]  # (B, 1, D)
        places = torch.arange(self.positions.num_embeddings, device=codes.device)
        seen = (places <= position)[None, None, None]
        for block, memory in zip(self.blocks, memories, strict=True):
            x = block.step(x, position, memory, seen)
        return self.head(self.norm_out(x))[:, 0]
