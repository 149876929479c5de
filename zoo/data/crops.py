"""The random crops that DALL-E's two stages are trained on (Ramesh et al. 2021, listings 1 and 2), for any size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo.errors import BadImage, SettingsError


def dvae_train_transform(size: int) -> SquareCrop:
    """PIL picture -> float (3, size, size) of 0..1: any square of the shorter edge, resized by areas to 9/8 to 3/2 of
    `size` (no more than the picture has), any square of `size` of that, mirrored half the time."""
    return SquareCrop(size=size, slack=(0.0, 1.0), scale=(1.125, 1.5), flip=0.5)


def dalle_train_transform(size: int) -> SquareCrop:
    """PIL picture -> float (3, size, size) of 0..1: a square near the centre, resized by areas to `size` to * 9/8, any
    square of `size` of that. Never mirrored: captions say left and right, and pictures hold words."""
    return SquareCrop(size=size, slack=(3 / 8, 5 / 8), scale=(1.0, 1.125), flip=0.0)


@dataclass(frozen=True, kw_only=True)
class SquareCrop:
    """`slack`: where the first square may lie, in parts of what the longer edge has more than the shorter. `scale`:
    the range of the size that it is resized to, in parts of `size`. `flip`: how often it is mirrored.

    Chance is drawn from torch's generator alone. Raises BadImage for a picture that cannot be decoded or has no pixels.
    """

    size: int
    slack: tuple[float, float]
    scale: tuple[float, float]
    flip: float

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SettingsError(f"size is a number of pixels, not {self.size}")

    def __call__(self, picture: Image.Image) -> Tensor:
        try:
            picture = picture.convert("RGB")
        except MemoryError:
            raise
        except Exception as error:  # on damaged bytes Pillow's decoders raise whatever their parsing ran into
            raise BadImage(f"the picture cannot be decoded ({error}); replace it or leave it out") from error
        side = min(picture.size)
        if side < 1:
            raise BadImage("the picture has no pixels; leave it out")
        left, upper = (_between(*(round(part * (edge - side)) for part in self.slack)) for edge in picture.size)
        # The paper resizes to min(side, 288) .. min(side, 384) for 256; a smaller picture is enlarged to 256.
        low, high = (max(self.size, min(side, round(self.size * part))) for part in self.scale)
        square = _between(low, high)
        filter = Image.Resampling.BOX if square <= side else Image.Resampling.BICUBIC  # areas cannot enlarge
        picture = picture.resize((square, square), filter, (left, upper, left + side, upper + side))
        left, upper = _between(0, square - self.size), _between(0, square - self.size)
        picture = picture.crop((left, upper, left + self.size, upper + self.size))
        if self.flip and torch.rand(()) < self.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div_(255)


@dataclass(frozen=True, kw_only=True)
class Dequantize:
    """`transform`, plus uniform noise of so many levels of 255: with one, pixels have the density of what was rounded.

    The density of a flat surface has no bound, and takes a likelihood's attention; more levels give edges their share.
    """

    transform: Callable[[Image.Image], Tensor]
    levels: float = 1.0

    def __call__(self, picture: Image.Image) -> Tensor:
        image = self.transform(picture)
        return (image + (torch.rand(image.shape) - 0.5) * (self.levels / 255)).clamp_(0, 1)


def _between(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))
