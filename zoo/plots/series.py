"""Numbers over steps: smoothed, thinned to what a screen can show, and whether they rise."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Series(NamedTuple):
    """A value at each of some steps, which rise."""

    steps: Sequence[float]
    values: Sequence[float]


class Bin(NamedTuple):
    """What a stretch of a series holds: the mean step, the mean value, the lowest and the highest."""

    step: float
    mean: float
    low: float
    high: float


def finite(series: Series) -> Series:
    """The series without what is no number."""
    pairs = [pair for pair in zip(series.steps, series.values, strict=True) if math.isfinite(pair[1])]
    return series if len(pairs) == len(series.steps) else Series([s for s, _ in pairs], [v for _, v in pairs])


def smooth(series: Series, reach: float) -> Series:
    """The mean of all values, of which one `reach` steps away, before or after, weighs 1/e: nothing lags behind.

    A series that is smooth as it is stays so, with its corners, such as a learning rate's.
    """
    steps, values = series
    if reach <= 0 or not is_noisy(values):
        return series
    kept = [math.exp((a - b) / reach) for a, b in pairwise(steps)]
    before = decaying(values, kept)
    after = decaying(values[::-1], kept[::-1])[::-1]
    # Each value is in the sum of what is before it and in that of what is after.
    made = [(a + c - v) / (b + d - 1) for (a, b), (c, d), v in zip(before, after, values, strict=True)]
    return Series(steps, made)


def decaying(values: Sequence[float], kept: Sequence[float]) -> list[tuple[float, float]]:
    """At each value, the sum of all up to it and of their weights; `kept` is what a step leaves of a weight."""
    total = weight = 0.0
    sums = []
    for value, left in zip(values, (0.0, *kept), strict=True):
        total, weight = total * left + value, weight * left + 1
        sums.append((total, weight))
    return sums


def is_noisy(values: Sequence[float]) -> bool:
    """Whether it goes up and down all the time: it turns at more than a tenth of its values."""
    ahead = [(b > a) - (b < a) for a, b in pairwise(values)]
    turns = sum(a * b < 0 for a, b in pairwise(ahead))
    return turns > len(values) / 10


def bins(series: Series, low: float, high: float, count: int) -> list[Bin]:
    """The steps from `low` to `high` in `count` stretches of one length, without those that hold nothing.

    Only the ends of a stretch are looked for, so that a log of a million lines takes milliseconds.
    """
    steps, values, found = series.steps, series.values, []
    start = bisect_left(steps, low)
    for number in range(1, count + 1):
        end = bisect_left(steps, low + (high - low) * number / count) if number < count else len(steps)
        if end > start:
            inside, where = values[start:end], steps[start:end]
            size = end - start
            found.append(Bin(sum(where) / size, sum(inside) / size, min(inside), max(inside)))
        start = end
    return found


def trend(values: Sequence[float]) -> int:
    """1 if the latest values rise, -1 if they fall, 0 if the difference may be noise.

    Latest is the last fifth, 4 values to 200; its halves are compared. They differ when their means do by more than
    two standard errors.
    """
    half = min(max(len(values) // 10, 2), 100)
    if len(values) < 2 * half:
        return 0
    early, late = values[-2 * half : -half], values[-half:]
    mean = sum(early) + sum(late)
    mean /= 2 * half
    error = math.sqrt(sum((value - mean) ** 2 for part in (early, late) for value in part)) / half
    change = (sum(late) - sum(early)) / half
    return (change > 0) - (change < 0) if abs(change) > 1.4 * error else 0
