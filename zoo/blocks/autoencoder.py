"""The convolutional halves of VQGAN and of Stable Diffusion's VAE (Esser et al. 2021, CompVis/taming-transformers).

B batch, C channels, H W pixels, h w latents. The names of parts are the published ones. Level 0 is at full resolution,
each further one at half of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

GROUPS = 32
EPS = 1e-6  # as taming published it; CLIP-GEN's release has torch's own default, 1e-5


def norm(channels: int, eps: float = EPS, groups: int = GROUPS) -> nn.GroupNorm:
    """The normalisation of all these layers, over groups of channels."""
    return nn.GroupNorm(groups, channels, eps=eps)


Norms = Callable[[int], nn.GroupNorm]


def conv(channels_in: int, channels_out: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size."""
    return nn.Conv2d(channels_in, channels_out, 3, padding=1)


class ResnetBlock(nn.Module):
    """x + two convolutions, each after a norm and swish."""

    def __init__(self, channels_in: int, channels_out: int, norms: Norms = norm):
        super().__init__()
        self.norm1 = norms(channels_in)
        self.conv1 = conv(channels_in, channels_out)
        self.norm2 = norms(channels_out)
        self.conv2 = conv(channels_out, channels_out)
        same = channels_in == channels_out
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) -> (B, channels_out, H, W)."""
        path = self.conv1(F.silu(self.norm1(x)))
        path = self.conv2(F.silu(self.norm2(path)))
        return self.nin_shortcut(x) + path


class AttnBlock(nn.Module):
    """x + self-attention of one head over all positions."""

    def __init__(self, channels: int, norms: Norms = norm):
        super().__init__()
        self.norm = norms(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        normed = self.norm(x)
        # The kernels that never hold all H W x H W weights ask for channels that lie side by side.
        q, k, v = (part(normed).flatten(2).mT.contiguous()[:, None] for part in (self.q, self.k, self.v))
        found = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, H W, C)
        return x + self.proj_out(found.mT.unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """A convolution of stride 2, padded on the right and below only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Each pixel becomes four, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Mid(nn.Module):
    """The middle of both halves, at the lowest resolution."""

    def __init__(self, channels: int, norms: Norms = norm):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, norms)
        self.attn_1 = AttnBlock(channels, norms)
        self.block_2 = ResnetBlock(channels, channels, norms)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """Residual blocks at one resolution, each with attention after it or none."""

    def __init__(self, channels_in: int, channels_out: int, blocks: int, attention: bool, norms: Norms = norm):
        super().__init__()
        widths = [channels_in, *[channels_out] * blocks]
        self.block = nn.ModuleList(ResnetBlock(widths[i], widths[i + 1], norms) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(channels_out, norms) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) -> (B, channels_out, H, W)."""
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if self.attn else x
        return x


class Encoder(nn.Module):
    """Pictures -> latents. `widths`: channels of each level. `attention`: levels that have it. `eps`, `groups`: of the
    norms; a group of one channel loses its mean, and so a picture's colour: with few channels take few groups."""

    def __init__(
        self,
        *,
        widths: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        out: int,
        eps: float = EPS,
        groups: int = GROUPS,
    ):
        super().__init__()
        norms = partial(norm, eps=eps, groups=groups)
        self.conv_in = conv(3, widths[0])
        self.down = nn.ModuleList()
        for number, width in enumerate(widths):
            level = Level(widths[max(0, number - 1)], width, blocks, number in attention, norms)
            if number + 1 < len(widths):
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Mid(widths[-1], norms)
        self.norm_out = norms(widths[-1])
        self.conv_out = conv(widths[-1], out)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, out, h, w)."""
        x = self.conv_in(image)
        for number, level in enumerate(self.down):
            x = level(x)
            x = level.downsample(x) if number + 1 < len(self.down) else x
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """Latents of `channels` -> `out` maps, 3 for pictures. Its levels have one block more than the encoder's."""

    def __init__(
        self,
        *,
        channels: int,
        widths: Sequence[int],
        blocks: int,
        attention: Sequence[int],
        out: int = 3,
        eps: float = EPS,
        groups: int = GROUPS,
    ):
        super().__init__()
        norms = partial(norm, eps=eps, groups=groups)
        self.conv_in = conv(channels, widths[-1])
        self.mid = Mid(widths[-1], norms)
        self.up = nn.ModuleList()
        for number, width in enumerate(widths):
            level = Level(widths[min(len(widths) - 1, number + 1)], width, blocks + 1, number in attention, norms)
            if number:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = norms(widths[0])
        self.conv_out = conv(widths[0], out)

    def forward(self, latents: Tensor) -> Tensor:
        """(B, channels, h, w) -> (B, out, H, W)."""
        x = self.mid(self.conv_in(latents))
        for number in reversed(range(len(self.up))):
            x = self.up[number](x)
            x = self.up[number].upsample(x) if number else x
        return self.conv_out(F.silu(self.norm_out(x)))
