"""Round numbers inside the range, each where the axis says."""

from __future__ import annotations

import math

import pytest

from zoo.plots.axis import Axis, axis_for, log_ticks, nice_ticks, number_text, tick_texts, wants_log

RANGES = [(0, 1), (0, 6000), (3.215, 3.859), (-2, 3), (-1e-6, 4e-6), (1e9, 1.0001e9), (0.17, 0.171), (0, 3e6), (-7, -5)]


@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("count", [3, 5, 8, 12])
def test_ticks_are_round_evenly_spaced_and_inside(low: float, high: float, count: int):
    ticks = nice_ticks(low, high, count)
    assert 2 <= len(ticks) <= count and low <= ticks[0] and ticks[-1] <= high
    step = ticks[1] - ticks[0]
    assert all(math.isclose(b - a, step, rel_tol=1e-6) for a, b in zip(ticks, ticks[1:], strict=False))
    assert min(abs(step / 10 ** math.floor(math.log10(step) + 1e-9) - f) for f in (1, 2, 5, 10)) < 1e-3
    # No room is left for another tick at either end.
    assert ticks[0] - low < step * 1.0001 and high - ticks[-1] < step * 1.0001


@pytest.mark.parametrize(("low", "high"), [(0.1, 7), (1e-8, 1e8), (0.9, 1.1), (3, 5000), (1e-12, 1e-3), (2, 6)])
@pytest.mark.parametrize("count", [3, 6])
def test_ticks_of_a_logarithmic_axis_are_round_and_inside(low: float, high: float, count: int):
    ticks = log_ticks(low, high, count)
    assert 2 <= len(ticks) <= count and ticks == sorted(ticks) and low <= ticks[0] and ticks[-1] <= high
    assert all(len(f"{tick:e}".partition("e")[0].rstrip("0")) <= 4 for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [r for r in RANGES if r != (1e9, 1.0001e9)])
def test_what_stands_beside_a_tick_is_its_value(low: float, high: float):
    ticks = nice_ticks(low, high, 6)
    units = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
    for tick, text in zip(ticks, tick_texts(ticks), strict=True):
        value = float(text[:-1]) * units[text[-1]] if text[-1] in units else float(text)
        assert value == pytest.approx(tick, rel=1e-9, abs=1e-30)
    assert len(set(tick_texts(ticks))) == len(ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (1234, "1234"), (65536, "65.54k"), (3e6, "3000k"), (2e7, "20M"), (2e-5, "2e-5")]
    + [(-0.5, "-0.5"), (1e300, "1e300"), (0.001, "0.001"), (4.23456e-7, "4.235e-7")],
)
def test_numbers_are_short(value: float, text: str):
    assert number_text(value) == text


def test_an_axis_holds_its_values_and_rises_with_them():
    for values in ([3, 1, 2], [5], [0, 0], [-4, -9], [1e-9, 1e-3, 1e-9, 1e-9, 1e-9], [7, 7.0000001]):
        axis = axis_for(values, 100, 0)
        places = [axis.place(value) for value in sorted(values)]
        assert places == sorted(places, reverse=True) and all(0 <= place <= 100 for place in places)


def test_an_axis_ends_where_it_says_and_factors_are_alike_on_a_logarithmic_one():
    even, log = Axis(2, 4, 10, 20), Axis(0.1, 10, 0, 200, log=True)
    assert [even.place(value) for value in (2, 3, 4)] == [10, 15, 20]
    assert [round(log.place(value), 9) for value in (0.1, 1, 10)] == [0, 100, 200]


def test_a_logarithmic_axis_is_for_a_few_large_values_among_small_ones():
    decay = [5 * math.exp(-i / 20) + 0.05 for i in range(300)]
    cosine = [1e-3 * (0.501 + 0.5 * math.cos(math.pi * i / 300)) for i in range(300)]
    assert wants_log(decay) and wants_log([1.0] * 99 + [500.0])
    assert not wants_log(cosine)
    assert not wants_log([*decay, 0.0]) and not wants_log([2.0, 3.0] * 9) and not wants_log([1.0, 100.0])
