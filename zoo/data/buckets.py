"""Pictures that keep their aspect ratio: each is cropped to the nearest of a few sizes of about the same area.

As NovelAI trained Stable Diffusion (NovelAI/novelai-aspect-ratio-bucketing).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from zoo.errors import BadImage, SettingsError

Size = tuple[int, int]  # width, height


def bucket_sizes(size: int, step: int = 64, ratio: float = 2.0) -> list[Size]:
    """Sizes whose edges are multiples of `step`, of no larger area than size * size, each with the longest edge that it
    can have, and of an aspect ratio of up to `ratio`; from tall to wide. Raises SettingsError."""
    if size < step or size % step or ratio < 1:
        raise SettingsError(
            f"buckets of {size} pixels in steps of {step}, ratio {ratio}: take a multiple, and 1 or more"
        )
    area, found = size * size, set()
    for short in range(step, size + 1, step):
        long = area // short // step * step
        if long <= ratio * short:
            found |= {(short, long), (long, short)}
    return sorted(found, key=lambda edges: edges[0] / edges[1])


class BucketDataset(Dataset):
    """(picture (3, H, W) of 0..1, tokens) of pairs that give PIL pictures, in the size nearest to the aspect ratio.

    `groups` (M,): which of `sizes` each sample has: a trainer makes batches of one size each. To know, every picture is
    opened once, by so many `workers`. A picture is resized until it covers the size, by areas where it shrinks, and
    any part of that is taken, by torch's chance. Raises BadImage for a picture without pixels.
    """

    def __init__(self, pairs: Dataset, sizes: list[Size], workers: int = 0, progress: bool = True):
        self.pairs, self.sizes = pairs, sizes
        seen = DataLoader(_Edges(pairs), batch_size=None, num_workers=workers)
        edges = [tuple(found) for found in tqdm(seen, "sizes of pictures", disable=not progress, delay=2)]
        self.groups = torch.tensor([nearest_size(width / height, sizes) for width, height in edges])

    @property
    def group_names(self) -> list[str]:
        """What the groups are called: their sizes in pixels."""
        return [f"{width}x{height}" for width, height in self.sizes]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, i: int) -> tuple[Tensor, Any]:
        picture, text = self.pairs[i]
        return crop_to(self.sizes[int(self.groups[i])], picture), text


class _Edges(Dataset):
    """Width and height of each picture."""

    def __init__(self, pairs: Dataset):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> Size:
        return self.pairs[i][0].size


def nearest_size(aspect: float, sizes: list[Size]) -> int:
    """The number of the size whose aspect ratio, width to height, is nearest on a logarithmic scale."""
    return min(range(len(sizes)), key=lambda i: abs(math.log(aspect * sizes[i][1] / sizes[i][0])))


def crop_to(size: Size, picture: Image.Image) -> Tensor:
    """PIL picture -> float (3, H, W) of 0..1, see BucketDataset."""
    if not all(picture.size):
        raise BadImage("the picture has no pixels; leave it out")
    scale = max(wanted / edge for wanted, edge in zip(size, picture.size, strict=True))
    part = [min(edge, wanted / scale) for wanted, edge in zip(size, picture.size, strict=True)]  # that is seen
    left, upper = (float(torch.rand(())) * (edge - seen) for edge, seen in zip(picture.size, part, strict=True))
    filter = Image.Resampling.BOX if scale <= 1 else Image.Resampling.BICUBIC  # areas cannot enlarge
    picture = picture.convert("RGB").resize(size, filter, (left, upper, left + part[0], upper + part[1]))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div_(255)
