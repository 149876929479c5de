"""Distort: random within its strength, from torch's generator alone, and nothing at strength 0."""

from __future__ import annotations

import pickle

import numpy as np
import torch
from PIL import Image

from zoo.data import Distort, clip_transform


def drawing() -> Image.Image:
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[20:50, 10:40] = (200, 30, 60)
    return Image.fromarray(pixels)


def test_no_strength_changes_nothing():
    plain = clip_transform(64)
    assert torch.equal(Distort(transform=plain, strength=0, grey=0)(drawing()), plain(drawing()))


def test_the_same_seed_gives_the_same_picture_and_another_gives_another():
    distort = pickle.loads(pickle.dumps(Distort(transform=clip_transform(64))))

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return distort(drawing())

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_what_moves_in_from_outside_is_white():
    torch.manual_seed(0)
    moved = [Distort(transform=lambda p: np.asarray(p), strength=1, grey=0)(drawing()) for _ in range(20)]
    corners = np.stack([m[[0, 0, -1, -1], [0, -1, 0, -1]] for m in moved])
    assert corners.min() >= 255 * 0.9 - 1  # white, but for the tint


def test_grey_pictures_have_one_value_in_all_colours_before_the_tint():
    grey = Distort(transform=lambda p: np.asarray(p), strength=0, grey=1)(drawing())
    assert (grey == grey[..., :1]).all()


def test_the_mean_of_many_turns_is_upright():
    torch.manual_seed(0)
    distort = Distort(transform=lambda p: np.asarray(p, np.float32), strength=1, grey=0)
    mean = np.mean([distort(drawing()) for _ in range(300)], 0)
    ink = 255 - mean[..., 1]
    rows, columns = np.indices(ink.shape)
    assert abs((ink * rows).sum() / ink.sum() - 34.5) < 1.5
    assert abs((ink * columns).sum() / ink.sum() - 24.5) < 1.5
