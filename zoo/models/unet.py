"""The UNet of Stable Diffusion: noised latents, timestep and context -> what the noise was (Rombach et al. 2022;
CompVis/stable-diffusion, ldm/modules/diffusionmodules/openaimodel.py). Names of parts are those of published folders.

B batch, C channels, h w latents, T tokens of context, D width, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks.recompute import recompute

LN_EPS, RESNET_EPS, ATTENTION_EPS = 1e-5, 1e-5, 1e-6  # as published
KeysValues = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes; the defaults are Stable Diffusion 1's. `channels` in, 9 to inpaint: latents, mask, latents of the masked
    picture; `out` of them. `widths`: channels of each level, each at half the resolution of the one before; `blocks`
    of each on the way down, and one more on the way up. `attention`: the levels that have it, with `heads` of each
    level and `depth` transformer blocks at a time. `context`: width of what conditions it. `mid`: false in some pruned
    ones. `linear`: how published files hold the two projections around the transformer blocks, as matrices or as 1x1
    convolutions; it computes the same. `upcast`: attention in fp32, which Stable Diffusion 2.1 needs in fp16. `size`:
    the side of the latents that it was trained on."""

    channels: int = 4
    out: int = 4
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    blocks: int = 2
    attention: tuple[int, ...] = (0, 1, 2)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    depth: int = 1
    context: int = 768
    mid: bool = True
    linear: bool = False
    upcast: bool = False
    groups: int = 32
    size: int = 64

    @classmethod
    def from_dict(cls, sizes: Mapping) -> UNetConfig:
        """The config that `dataclasses.asdict`, and so a config.json, says. Unknown names raise TypeError."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()})


class TimeEmbedding(nn.Module):
    """Waves of the timestep, cosines first, through two linear layers."""

    def __init__(self, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, 4 * width)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Timesteps (B,) -> (B, 4 width)."""
        half = self.linear_1.in_features // 2
        places = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps.float()[:, None] * torch.exp(places * (-math.log(10000) / half))
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(self.linear_1.weight.dtype)
        return self.linear_2(F.silu(self.linear_1(waves)))


class ResnetBlock(nn.Module):
    """x + two convolutions, between which the timestep is added."""

    def __init__(self, channels_in: int, channels_out: int, time: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in, RESNET_EPS)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(time, channels_out)
        self.norm2 = nn.GroupNorm(groups, channels_out, RESNET_EPS)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.conv_shortcut = None if channels_in == channels_out else nn.Conv2d(channels_in, channels_out, 1)
        nn.init.zeros_(self.conv2.weight)  # as published: each block begins as the identity
        nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """(B, channels_in, h, w) and silu of the time embedding (B or 1, time) -> (B, channels_out, h, w)."""
        path = self.conv1(F.silu(self.norm1(x))) + self.time_emb_proj(time)[:, :, None, None]
        path = self.conv2(F.silu(self.norm2(path)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + path


class Attention(nn.Module):
    """Of tokens to themselves, or to a context."""

    def __init__(self, width: int, heads: int, context: int | None = None, upcast: bool = False):
        super().__init__()
        self.heads, self.upcast = heads, upcast
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context or width, width, bias=False)
        self.to_v = nn.Linear(context or width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, context) -> keys and values, each (B, H, T, D / H)."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def forward(self, x: Tensor, known: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D). `known`: keys and values of the context; None: of x itself."""
        q, (k, v) = self._split(self.to_q(x)), known or self.keys_values(x)
        if self.upcast:
            found = F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(x.dtype)
        else:
            found = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](found.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


class Geglu(nn.Module):
    """A linear layer to twice the width, one half of which gates the other (Shazeer 2020)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, hidden)."""
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU and back, at four times the width."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList([Geglu(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Attention to all places, to the context, and a feed-forward layer, each added to its input."""

    def __init__(self, width: int, heads: int, context: int, upcast: bool):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, LN_EPS) for _ in range(3))
        self.attn1 = Attention(width, heads, upcast=upcast)
        self.attn2 = Attention(width, heads, context, upcast)
        self.ff = FeedForward(width)

    def forward(self, x: Tensor, known: tuple[Tensor, Tensor] | Tensor) -> Tensor:
        """(B, N, D) and the context, or its keys and values -> (B, N, D)."""
        known = self.attn2.keys_values(known) if isinstance(known, Tensor) else known
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), known)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over all places of a map, added to it."""

    def __init__(self, width: int, heads: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, width, ATTENTION_EPS)
        self.proj_in = nn.Linear(width, width)
        blocks = (TransformerBlock(width, heads, config.context, config.upcast) for _ in range(config.depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = nn.Linear(width, width)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, context: Tensor | KeysValues) -> Tensor:
        """(B, D, h, w) and the context (B, T, context), or its keys and values for each block -> (B, D, h, w)."""
        # Where channels lie side by side, both turns are views.
        tokens = self.proj_in(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        for number, block in enumerate(self.transformer_blocks):
            tokens = block(tokens, context if isinstance(context, Tensor) else context[number])
        return x + self.proj_out(tokens).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class Resample(nn.Module):
    """A convolution to half the resolution, or after doubling it."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=stride, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, h, w) -> half of it; with `size` each pixel is repeated to that size first."""
        return self.conv(x if size is None else F.interpolate(x, size, mode="nearest"))


class Level(nn.Module):
    """What the network does at one resolution: residual blocks, each with a transformer after it or none."""

    def __init__(self, channels: list[int], width: int, level: int | None, config: UNetConfig):
        """`channels` that come into each block; `level`: None in the middle, which ends with a block."""
        super().__init__()
        time, heads = 4 * config.widths[0], config.heads[-1 if level is None else level]
        self.resnets = nn.ModuleList(ResnetBlock(c, width, time, config.groups) for c in channels)
        attentions = len(channels) - 1 if level is None else len(channels) * (level in config.attention)
        self.attentions = nn.ModuleList(SpatialTransformer(width, heads, config) for _ in range(attentions))
        self.downsamplers: nn.ModuleList | None = None
        self.upsamplers: nn.ModuleList | None = None
        self.checkpointing = False

    def block(self, number: int, x: Tensor, time: Tensor, context: Tensor | list[KeysValues]) -> Tensor:
        """The residual block of that number, and the transformer after it, which reads the context, or its own of the
        keys and values."""
        if self.checkpointing and self.training:
            return recompute(self, number, x, time, context, call=self._block)
        return self._block(number, x, time, context)

    def _block(self, number: int, x: Tensor, time: Tensor, context: Tensor | list[KeysValues]) -> Tensor:
        x = self.resnets[number](x, time)
        if number < len(self.attentions):
            x = self.attentions[number](x, context if isinstance(context, Tensor) else context[number])
        return x


class UNet(nn.Module):
    """Down through the levels and up again; what each block gave on the way down is read on the way up."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, blocks, deepest = config.widths, config.blocks, len(config.widths) - 1
        self.conv_in = nn.Conv2d(config.channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0])
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        kept = [widths[0]]  # channels of what is read on the way up
        for number, width in enumerate(widths):
            level = Level([kept[-1], *[width] * (blocks - 1)], width, number, config)
            kept += [width] * blocks
            if number < deepest:
                level.downsamplers = nn.ModuleList([Resample(width, stride=2)])
                kept.append(width)
            self.down_blocks.append(level)
        self.mid_block = Level([widths[-1]] * 2, widths[-1], None, config) if config.mid else None
        before = widths[-1]
        for number in reversed(range(len(widths))):
            width = widths[number]
            joined = [(before if i == 0 else width) + kept.pop() for i in range(blocks + 1)]
            level = Level(joined, width, number, config)
            if number:
                level.upsamplers = nn.ModuleList([Resample(width, stride=1)])
            self.up_blocks.append(level)
            before = width
        self.conv_norm_out = nn.GroupNorm(config.groups, widths[0], RESNET_EPS)
        self.conv_out = nn.Conv2d(widths[0], config.out, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)
        nn.init.zeros_(self.conv_out.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Blocks' activations are computed again in the backward pass."""
        for module in self.modules():
            if isinstance(module, Level):
                module.checkpointing = enable

    def keys_values(self, context: Tensor) -> list[list[KeysValues]]:
        """Context (B, T, context) -> what `forward` takes in its place: the keys and values of each transformer block,
        level by level, which do not change from step to step."""
        levels = [*self.down_blocks, *([] if self.mid_block is None else [self.mid_block]), *self.up_blocks]
        return [
            [[block.attn2.keys_values(context) for block in part.transformer_blocks] for part in level.attentions]
            for level in levels
        ]

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor | list[list[KeysValues]]) -> Tensor:
        """Noised latents (B, channels, h, w), timesteps (B,) or one of all, and the context (B, T, context), or what
        `keys_values` made of it -> what the noise schedule's prediction names, (B, out, h, w)."""
        known = repeat(context) if isinstance(context, Tensor) else iter(context)  # for each level
        time = F.silu(self.time_embedding(timesteps.reshape(-1)))  # (B or 1, 4 width)
        x = self.conv_in(latents)
        kept = [x]
        for level in self.down_blocks:
            own = next(known)
            for number in range(len(level.resnets)):
                x = level.block(number, x, time, own)
                kept.append(x)
            if level.downsamplers is not None:
                x = level.downsamplers[0](x)
                kept.append(x)
        if self.mid_block is not None:
            own = next(known)
            x = self.mid_block.block(1, self.mid_block.block(0, x, time, own), time, own)
        for level in self.up_blocks:
            own = next(known)
            for number in range(len(level.resnets)):
                x = level.block(number, torch.cat([x, kept.pop()], 1), time, own)
            if level.upsamplers is not None:
                x = level.upsamplers[0](x, kept[-1].shape[-2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))
