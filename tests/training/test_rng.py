"""Chance can be seeded, kept and stored, in all three generators."""

from __future__ import annotations

import random

import numpy as np
import torch

from zoo.training import rng


def draw() -> tuple:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_equal_numbers_give_equal_chance_and_others_other():
    drawn = []
    for numbers in [(1, 2), (1, 2), (2, 1), (1, 3), (12,)]:
        rng.seed_cpu(*numbers)
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    for column in zip(*drawn, strict=True):
        assert len(set(column)) == 4


def test_kept_chance_goes_on_as_if_nothing_was_drawn():
    rng.seed_all(1)
    expected = draw()
    rng.seed_all(1)
    with rng.kept():
        rng.seed_all(5)
        draw()
    assert draw() == expected


def test_a_stored_state_is_returned_to():
    rng.seed_all(1)
    draw(), np.random.randn()  # an odd number of normal draws leaves one cached
    state = rng.get_state()
    expected = draw(), float(np.random.randn())
    rng.set_state(state)
    assert (draw(), float(np.random.randn())) == expected
