"""Distortions for small sets of drawings on white, where crops alone do not keep a network from learning by heart."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Distort:
    """`transform` of a picture that was turned, stretched, moved, paled and tinted at random, now and then made grey.

    At `strength` 1: up to 11 degrees, 15% of size, 10% of aspect, 6% of the side, 30% of contrast to white, 10% of each
    colour; `grey` is how often the colours go. Left and right stay what they are: captions say "left" and "right".
    Chance is drawn from torch's generator alone, so a run that restores it sees the same pictures again.
    """

    transform: Callable[[Image.Image], Tensor]
    strength: float = 1.0
    grey: float = 0.1

    def __call__(self, picture: Image.Image) -> Tensor:
        spread = (2 * torch.rand(9) - 1) * self.strength
        angle, size, aspect, right, down, contrast, *tint = spread.tolist()
        moved = _move(picture.convert("RGB"), 0.2 * angle, 1 + 0.15 * size, 1 + 0.1 * aspect, 0.06 * right, 0.06 * down)
        pixels = np.asarray(moved, np.float32)
        if torch.rand(()) < self.grey:
            pixels = pixels.mean(-1, keepdims=True)
        pixels = ((pixels - 255) * (1 + 0.3 * contrast) + 255) * (1 + 0.1 * np.array(tint, np.float32))
        return self.transform(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))


def _move(picture: Image.Image, angle: float, size: float, aspect: float, right: float, down: float) -> Image.Image:
    """The picture turned about its centre (radians), scaled, and moved by fractions of its edges, on white."""
    width, height = picture.size
    cos, sin = math.cos(angle) / size, math.sin(angle) / size
    a, b, d, e = cos * aspect, -sin * aspect, sin / aspect, cos / aspect
    x, y = width / 2, height / 2
    c, f = x - a * (x + right * width) - b * (y + down * height), y - d * (x + right * width) - e * (y + down * height)
    return picture.transform(
        picture.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR, fillcolor=(255, 255, 255)
    )
