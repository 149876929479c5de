"""How far two pictures are apart, by their pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import DataError


def psnr(first: Tensor, second: Tensor) -> Tensor:
    """Two batches of pictures (B, C, H, W) of 0..1 -> peak signal-to-noise ratios (B,) in decibels, float64.

    10 log10(1 / the mean of the squared differences) of each picture; infinite for equal ones. Raises DataError when
    shapes differ.
    """
    if first.shape != second.shape:
        raise DataError(f"pictures of two shapes, {(*first.shape,)} and {(*second.shape,)}, cannot be compared")
    return -10 * torch.log10((first.double() - second.double()).square().flatten(1).mean(1))
