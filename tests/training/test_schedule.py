"""The rate is a pure function of the step."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from zoo.errors import SettingsError
from zoo.training.schedule import Schedule, cosine, lr_at, warm_up_steps


def rates(total: int = 10, warm_up: int = 4, **words) -> list[float]:
    return [lr_at(step, peak=2.0, total=total, warm_up=warm_up, **words) for step in range(total)]


def test_warm_up_rises_evenly_to_the_peak():
    assert rates()[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert rates(warm_up=0)[0] == 2.0


def test_values_of_each_decay():
    assert rates(decay="constant")[4:] == [2.0] * 6
    assert rates(decay="linear")[4:] == pytest.approx([2 * (1 - k / 6) for k in range(6)])
    assert rates(decay="cosine")[4:] == pytest.approx([1 + math.cos(math.pi * k / 6) for k in range(6)])
    assert lr_at(10, peak=2.0, total=10, warm_up=4, floor=0.1) == pytest.approx(0.2)
    assert lr_at(99, peak=2.0, total=10, warm_up=4, decay="linear", floor=0.1) == pytest.approx(0.2)


def test_warm_up_is_a_fraction_or_steps():
    assert [warm_up_steps(w, 50) for w in (0, 0.1, 1, 7, 80)] == [0, 5, 1, 7, 50]


def test_groups_keep_their_ratio():
    schedule = Schedule([1e-3, 1e-4], partial(lr_at, peak=1e-3, total=10, warm_up=2))
    assert schedule(0) == pytest.approx([5e-4, 5e-5])
    assert Schedule([1e-3, 1e-4], None, client=lambda step: 0.5)(3) == pytest.approx([0.5, 0.05])


def test_a_torch_scheduler_has_its_own_rate_for_each_group():
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [a]}, {"params": [b]}], lr=1.0)
    schedule = Schedule(
        [1.0, 1.0], None, torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda s: s, lambda s: 1 / (s + 1)])
    )
    seen = []
    for step in range(3):
        seen.append(schedule(step))
        optimizer.step()
        schedule.advance()
    assert seen == [[0.0, 1.0], [1.0, 0.5], [2.0, pytest.approx(1 / 3)]]


def test_what_is_no_schedule_is_refused():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(SettingsError, match="ReduceLROnPlateau"):
        Schedule([1.0], None, torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(SettingsError, match="str"):
        Schedule([1.0], None, "cosine")


def test_cosine_goes_from_start_to_end_and_stays():
    for step in range(13):
        done = min(step, 10) / 10
        wanted = 5 + (1 - 5) * 0.5 * (1 + math.cos(math.pi * done))
        assert cosine(step, 1.0, 5.0, 10) == pytest.approx(wanted)
    assert cosine(0, 1.0, 5.0, 0) == 5.0
