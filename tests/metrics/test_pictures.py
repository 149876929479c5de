from __future__ import annotations

import math

import pytest
import torch

from zoo.errors import DataError
from zoo.metrics.pictures import psnr


def test_psnr_is_the_ratio_to_the_mean_of_the_squares():
    first, second = torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    second[0] = 0.1  # all values: a mean square of 0.01
    second[1, 0, 0, 0] = 0.2  # one of four: the same
    found = psnr(first, second)
    assert found[:2].tolist() == pytest.approx([20, 20], abs=1e-5)
    assert math.isinf(found[2])


def test_pictures_of_two_shapes_are_refused():
    with pytest.raises(DataError, match=r"\(1, 3, 4, 4\) and \(1, 3, 4, 5\)"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5))
