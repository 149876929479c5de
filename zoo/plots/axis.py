"""An axis: where a value is drawn, and the round numbers beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` stand from place `start` to place `end`; evenly, or each factor alike if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value stands; outside the range, beyond the ends."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return self.start + (self.end - self.start) * ((value - low) / (high - low))

    def ticks(self, count: int) -> list[tuple[float, str]]:
        """About `count` round numbers of the range, and how they are written."""
        if self.log:
            return [(tick, number_text(tick)) for tick in log_ticks(self.low, self.high, count)]
        ticks = nice_ticks(self.low, self.high, count)
        return list(zip(ticks, tick_texts(ticks), strict=True))


def axis_for(values: Sequence[float], start: float, end: float, *, room: float = 0.05) -> Axis:
    """An axis that holds all values and a share of `room` beyond; logarithmic where `wants_log` says so."""
    low, high = min(values), max(values)
    if wants_log(values):
        beyond = (high / low) ** room
        return Axis(low / beyond, high * beyond, start, end, log=True)
    if not high - low > 1e-9 * max(abs(low), abs(high)):  # all alike: in the middle
        reach = abs(high) / 2 or 1.0
        return Axis(low - reach, high + reach, start, end)
    beyond = (high - low) * room
    # What is never negative has no room below zero.
    return Axis(max(low - beyond, 0.0) if low >= 0 else low - beyond, high + beyond, start, end)


def wants_log(values: Sequence[float]) -> bool:
    """Whether a few large values would press all others flat: the middle half fills under a seventh of the range.

    Only where all are positive and the largest is twenty times the least.
    """
    if len(values) < 4 or min(values) <= 0 or max(values) < 20 * min(values):
        return False
    ordered = sorted(values)
    middle = ordered[len(ordered) * 3 // 4] - ordered[len(ordered) // 4]
    return middle < (ordered[-1] - ordered[0]) / 7


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, from `low` to `high`: `count` at most, where that leaves two."""
    if not low < high:
        return [low]
    power = math.floor(math.log10((high - low) / max(count, 2))) - 1
    before: list[float] = [low, high]
    for exponent in range(power, power + 4):
        for factor in (1, 2, 5):
            ticks = multiples(low, high, factor, exponent)
            if len(ticks) < 2:
                return before
            if len(ticks) <= count:
                return ticks
            before = ticks
    return before


def multiples(low: float, high: float, factor: int, exponent: int) -> list[float]:
    """All multiples of factor * 10^exponent from `low` to `high`; each the double nearest to its decimal."""
    step = float(f"{factor}e{exponent}")
    first, last = math.ceil(low / step), math.floor(high / step)
    ticks = [float(f"{number * factor}e{exponent}") for number in range(first - 1, last + 2)]
    return [tick for tick in ticks if low <= tick <= high]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten from `low` to `high`, as many as `count`; with 2 and 5 between where they are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{f}e{e}") for e in range(first, last + 1) for f in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= max(count, 2):
            break
    if len(ticks) < 2:
        return nice_ticks(low, high, count)
    return ticks[:: math.ceil(len(ticks) / max(count, 2))]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """The ticks as text: in one unit where they are large, all with as many decimals as the finest needs."""
    largest = max(map(abs, ticks), default=0.0)
    if largest >= 1e15 or 0 < largest < 1e-3:
        return [power_text(tick) for tick in ticks]
    unit, name = next(((u, n) for u, n in UNITS if largest >= 10 * u or (u > 1e3 and largest >= u)), (1.0, ""))
    decimals = max((len(f"{tick / unit:.10g}".partition(".")[2]) for tick in ticks), default=0)
    return ["0" if tick == 0 else f"{tick / unit:.{decimals}f}{name}" for tick in ticks]


def number_text(value: float) -> str:
    """12,500 -> 12.5k; 0.02 -> 0.02; 0.00002 -> 2e-5: as short as its four digits allow."""
    size = abs(value)
    if size >= 9.9995e14 or 0 < size < 9.9995e-4:
        return power_text(value)
    unit, name = next(((u, n) for u, n in UNITS if size >= 9.9995 * u), (1.0, ""))
    return f"{value / unit:.4g}{name}"


def power_text(value: float) -> str:
    """0.00002 -> 2e-5."""
    if value == 0:
        return "0"
    digits, _, exponent = f"{value:.3e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
