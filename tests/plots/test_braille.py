"""Curves as text: they rise where the series rises, have the size asked for, and say their ends."""

from __future__ import annotations

import math

import pytest

from zoo.plots.braille import BLANK, BLOCKS, DOTS, curve, letters, plain, sparkline
from zoo.plots.series import Series


def dots_of(rows: list[str]) -> dict[int, list[int]]:
    """The rows of the dots in each column of dots, top is 0."""
    found: dict[int, list[int]] = {}
    for y, row in enumerate(rows):
        for x, letter in enumerate(row):
            bits = ord(letter) - BLANK if letter != " " else 0
            for dy, pair in enumerate(DOTS):
                for dx, bit in enumerate(pair):
                    if bits & bit:
                        found.setdefault(2 * x + dx, []).append(4 * y + dy)
    return found


def drawn(series: Series, width: int = 40, height: int = 9, **settings) -> dict[int, list[int]]:
    lines = curve(series, width, height, last=series.steps[-1], **settings)
    return dots_of([line[max(line.find("┤"), line.find("│")) + 1 :] for line in lines[:-1]])


@pytest.mark.parametrize("count", [2, 5, 37, 500])
@pytest.mark.parametrize("shape", [lambda p: p, lambda p: p**3, lambda p: -math.exp(-5 * p)])
def test_a_rising_series_rises_in_every_column_without_a_gap(count: int, shape):
    columns = drawn(Series(range(count), [shape(i / count) for i in range(count)]))
    tops = [min(columns[x]) for x in sorted(columns)]
    assert sorted(columns) == list(range(min(columns), max(columns) + 1))
    assert tops == sorted(tops, reverse=True)
    assert (max(max(rows) for rows in columns.values()), min(tops)) == (31, 0)
    for left, right in zip(sorted(columns), sorted(columns)[1:], strict=False):
        assert min(columns[left]) - max(columns[right]) <= 1


def test_the_upside_down_series_is_the_picture_upside_down():
    values = [math.sin(i / 9) for i in range(200)]
    up, down = (drawn(Series(range(200), [sign * v for v in values]), span=(-1, 1)) for sign in (1, -1))
    assert up.keys() == down.keys()
    assert all(sum(up[x]) / len(up[x]) + sum(down[x]) / len(down[x]) == pytest.approx(31, abs=2) for x in up)


def test_letters_and_dots_are_one_to_one():
    chosen = {(0, 0), (1, 3), (5, 7), (7, 4)}
    found = dots_of(letters(chosen | {(99, 0), (0, -1)}, 4, 2))
    assert {(x, y) for x, rows in found.items() for y in rows} == chosen
    assert letters(set(), 3, 2) == ["   ", "   "]


@pytest.mark.parametrize("width", [12, 40, 133])
@pytest.mark.parametrize("height", [3, 10])
def test_a_curve_has_the_size_asked_for_and_names_its_ends(width: int, height: int):
    lines = curve(Series([10, 20, 30], [1.5, 4.25, 2]), width, height, last=60)
    assert len(lines) == height and all(len(line) <= width for line in lines)
    assert "4.25" in lines[0] and "1.5" in lines[height - 2] and lines[-1].lstrip().startswith("0")


def test_curves_of_one_span_are_on_one_scale():
    low, high = (drawn(Series([0, 1, 2], [v, v, v]), span=(0, 10)) for v in (0, 10))
    assert {y for rows in low.values() for y in rows} == {31} and {y for rows in high.values() for y in rows} == {0}


def test_a_run_half_way_fills_half_the_width():
    lines = curve(Series(range(51), range(51)), 62, 6, last=100)
    assert 28 <= max(len(line.rstrip()) for line in lines[:-1]) - lines[0].index("┤") <= 32


@pytest.mark.parametrize("values", [[], [3.0], [0.0, 0.0], [1e300, -1e300], [5e-324, 1.0, 1.0, 1.0]])
def test_odd_series_are_drawn(values: list[float]):
    series = Series(range(1, len(values) + 1), values)
    assert curve(series, 30, 5, last=4)
    assert len(sparkline(series, 8)) <= 8


def test_a_sparkline_has_its_lowest_and_highest_block_where_the_series_has():
    line = sparkline(Series(range(64), [abs(i - 32) for i in range(64)]), 8)
    assert len(line) == 8 and line[0] == BLOCKS[-1] and min(line) == line[4] == BLOCKS[0]


def test_plain_letters_are_those_of_every_terminal():
    text = "\n".join(curve(Series(range(9), range(9)), 30, 5, last=8)) + sparkline(Series([1, 2], [1, 2]), 4) + "↗→↘█░…"
    assert plain(text).isascii() and len(plain(text)) == len(text) and "*" in plain(text)
