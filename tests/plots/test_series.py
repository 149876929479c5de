"""Smoothing invents nothing and lags nowhere; thinning keeps every value; a trend is more than noise."""

from __future__ import annotations

import math
import random
import time
from array import array

import pytest

from zoo.plots.series import Series, bins, finite, is_noisy, smooth, trend

NOISE = random.Random(0)
NOISY = Series(range(400), [NOISE.gauss(0, 1) for _ in range(400)])


def test_a_smoothed_series_has_less_noise_and_stays_within_its_values():
    smoothed = smooth(NOISY, 20)
    assert smoothed.steps == NOISY.steps
    assert min(NOISY.values) < min(smoothed.values) and max(smoothed.values) < max(NOISY.values)
    assert sum(v * v for v in smoothed.values) < sum(v * v for v in NOISY.values) / 10


def test_smoothing_nothing_is_the_same():
    assert smooth(NOISY, 0) is NOISY


def test_smoothing_lags_neither_way():
    line = Series(range(401), [i + 3 * (-1) ** i for i in range(401)])
    assert smooth(line, 10).values[200] == pytest.approx(200, abs=0.3)
    backwards = smooth(Series([-s for s in line.steps[::-1]], line.values[::-1]), 10)
    assert backwards.values[::-1] == pytest.approx(smooth(line, 10).values)


def test_smoothing_weighs_by_steps_not_by_lines():
    sparse = Series([0, 1, 2, 3, 1000, 1001, 1002], [0, 1, 0, 1, 9, 8, 9])
    smoothed = smooth(sparse, 5).values
    assert max(smoothed[:4]) < 1 and min(smoothed[4:]) > 8


def test_what_is_smooth_keeps_its_corners():
    warm_up = Series(range(100), [min(i, 10) for i in range(100)])
    assert smooth(warm_up, 20) is warm_up
    assert not is_noisy(warm_up.values) and is_noisy(NOISY.values)


def test_bins_keep_all_values_and_their_order():
    series = Series(array("d", range(1, 1001)), array("d", [i % 7 for i in range(1, 1001)]))
    found = bins(series, 0, 1000, 40)
    assert len(found) == 40 and [b.step for b in found] == sorted(b.step for b in found)
    assert all(b.low <= b.mean <= b.high for b in found)
    counts = [math.ceil(1000 * (i + 1) / 40) - math.ceil(1000 * i / 40) for i in range(40)]
    assert sum(b.mean for b in found) / 40 == pytest.approx(sum(series.values) / 1000, rel=0.01) and sum(counts) == 1000
    assert (found[-1].high, found[0].low) == (6, 0)


def test_of_few_values_each_has_its_own_bin():
    assert [b.mean for b in bins(Series([1, 50, 100], [3, 1, 2]), 0, 100, 100)] == [3, 1, 2]
    assert bins(Series([], []), 0, 10, 5) == []


def test_a_million_lines_are_thinned_at_once():
    long = Series(array("d", range(1_000_000)), array("d", bytes(8_000_000)))
    start = time.perf_counter()
    assert len(bins(long, 0, 1e6, 200)) == 200
    assert time.perf_counter() - start < 2


def test_only_numbers_stay():
    nan, inf = float("nan"), float("inf")
    assert finite(Series([1, 2, 3, 4], [1.0, nan, inf, 2.0])) == Series([1, 4], [1.0, 2.0])


def test_a_trend_is_told_from_noise():
    ramp = [i / 100 + NOISE.gauss(0, 0.01) for i in range(200)]
    assert trend(ramp) == 1 and trend([-v for v in ramp]) == -1
    assert trend([5.0] * 50) == 0 and trend([1.0, 2.0]) == 0 and trend([]) == 0
    noise = [trend([NOISE.gauss(0, 1) for _ in range(200)]) for _ in range(200)]
    assert noise.count(0) > 140
