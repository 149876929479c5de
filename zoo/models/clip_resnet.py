"""CLIP's ModifiedResNet image tower (openai/CLIP, clip/model.py). C channels, H W spatial, E embedding."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks.recompute import recompute


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    """Sizes of a ModifiedResNet. `size` is the picture's side in pixels, a multiple of 32."""

    size: int = 224
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)
    width: int = 64


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions; a stride is an average pool, so that nothing is aliased away."""

    def __init__(self, channels: int, planes: int, stride: int):
        super().__init__()
        wide = planes * 4
        self.conv1, self.bn1 = nn.Conv2d(channels, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3, self.bn3 = nn.Conv2d(planes, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != wide:
            parts = OrderedDict(pool=nn.AvgPool2d(stride), conv=nn.Conv2d(channels, wide, 1, bias=False))
            self.shortcut = nn.Sequential(OrderedDict(parts, bn=nn.BatchNorm2d(wide)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 4 * planes, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.pool(F.relu(self.bn2(self.conv2(out))))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class AttentionPool(nn.Module):
    """One attention step whose only query is the mean of all places."""

    def __init__(self, side: int, channels: int, heads: int, embed: int):
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(torch.empty(side**2 + 1, channels))
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
        self.out = nn.Linear(channels, embed)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, E)."""
        x = x.flatten(2).transpose(1, 2)  # (B, H * W, C)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positions
        q, k, v = (
            layer(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer, y in ((self.q, x[:, :1]), (self.k, x), (self.v, x))
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).flatten(1))


class ModifiedResNet(nn.Module):
    """ResNet with a three-convolution stem, anti-aliased strides and an attention pool in place of the mean."""

    def __init__(self, config: ResNetConfig, embed: int):
        super().__init__()
        width = config.width
        self.conv1, self.bn1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv2, self.bn2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False), nn.BatchNorm2d(width // 2)
        self.conv3, self.bn3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.layers = nn.ModuleList()
        channels = width
        for level, depth in enumerate(config.layers):
            planes = width * 2**level
            strides = [1 if level == 0 else 2] + [1] * (depth - 1)
            blocks = [Bottleneck(channels if i == 0 else planes * 4, planes, s) for i, s in enumerate(strides)]
            self.layers.append(nn.Sequential(*blocks))
            channels = planes * 4
        self.pool = AttentionPool(config.size // 32, channels, channels // 64, embed)
        self.checkpointing = False
        self.init_weights()

    def init_weights(self) -> None:
        """As published: residual branches start at zero, the attention pool at 1 / sqrt(channels)."""
        pool = self.pool
        for parameter in (pool.positions, pool.q.weight, pool.k.weight, pool.v.weight, pool.out.weight):
            nn.init.normal_(parameter, std=pool.q.in_features**-0.5)
        for block in (b for layer in self.layers for b in layer):
            nn.init.zeros_(block.bn3.weight)

    @property
    def groups(self) -> list[nn.Module]:
        """The parts in the order in which they are unlocked from the end."""
        stem = nn.ModuleList([self.conv1, self.bn1, self.conv2, self.bn2, self.conv3, self.bn3])
        return [stem, *self.layers, self.pool]

    def forward(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, size, size) -> embeddings (B, E)."""
        x = image.contiguous(memory_format=torch.channels_last)  # what convolutions in bf16 are fastest on
        for conv, bn in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = F.relu(bn(conv(x)))
        x = F.avg_pool2d(x, 2)
        for layer in self.layers:
            x = recompute(layer, x) if self.checkpointing and self.training else layer(x)
        return self.pool(x)
