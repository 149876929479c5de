"""Curves as text: a letter of braille has two dots beside each other and four above, so a terminal shows fine lines."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from .axis import Axis, axis_for, number_text
from .series import Bin, Series, bins

# The bit of each dot of a braille letter, by row and column (Unicode, chapter 21.1).
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
BLANK = 0x2800
BLOCKS = "▁▂▃▄▅▆▇█"
ARROWS = {1: "↗", 0: "→", -1: "↘"}
# For a terminal that has none of these letters.
PLAIN = {BLANK + bits: "*" for bits in range(1, 256)} | str.maketrans("▁▂▃▄▅▆▇█↗→↘░┤│└─·…", "..--==##^-v.+|+---")


def curve(
    series: Series, width: int, height: int, *, last: float, span: tuple[float, float] | None = None
) -> list[str]:
    """A series from step 0 to `last` in `height` lines of `width` letters, with its highest and lowest value and steps.

    `span` are the lowest and highest value to make room for, by default those of the series: curves beside each other
    share one. Of several values in one dot's width the mean is drawn.
    """
    columns = bins(series, 0, last, 2 * max(width, 1)) if last > 0 else []
    values = [column.mean for column in columns] + list(span or ())
    if not columns or height < 3:
        return ["(no values yet)"[:width]]
    y = axis_for(values, 4 * (height - 1) - 1, 0, room=0)
    top, bottom = number_text(y.high), number_text(y.low)
    left = max(len(top), len(bottom))
    inner = max(width - left - 2, 1)
    x = Axis(0, last, 0, 2 * inner - 1)
    rows = letters(dots(bins(series, 0, last, 2 * inner), x, y), inner, height - 1)
    labels = {0: top, height - 2: bottom}
    lines = [f"{labels.get(i, ''):>{left}} {'┤' if i in labels else '│'}{row}" for i, row in enumerate(rows)]
    end = f"step {last:,.0f}"
    return [*lines, " " * (left + 2) + "0" + end.rjust(inner - 1)[: inner - 1]]


def dots(columns: Sequence[Bin], x: Axis, y: Axis) -> set[tuple[int, int]]:
    """The dots (column, row) of a line through all bins: one in each column at least, from first to last."""
    places = [(round(x.place(bin.step)), round(y.place(bin.mean))) for bin in columns]
    drawn = set(places[:1])
    for (x0, y0), (x1, y1) in pairwise(places):
        for column in range(x0 + 1, x1 + 1):
            here = round(y0 + (y1 - y0) * (column - x0) / (x1 - x0))
            before = round(y0 + (y1 - y0) * (column - 1 - x0) / (x1 - x0))
            step = 1 if here >= before else -1
            drawn |= {(column, row) for row in range(before + step * (here != before), here + step, step)}
        if x0 == x1:
            drawn |= {(x0, row) for row in range(min(y0, y1), max(y0, y1) + 1)}
    return drawn


def letters(drawn: set[tuple[int, int]], width: int, height: int) -> list[str]:
    """`height` lines of `width` braille letters with the dots (column, row) set; row 0 is at the top."""
    rows = [[BLANK] * width for _ in range(height)]
    for column, row in drawn:
        if 0 <= column < 2 * width and 0 <= row < 4 * height:
            rows[row // 4][column // 2] |= DOTS[row % 4][column % 2]
    # A blank letter of braille is empty circles in some fonts.
    return ["".join(" " if bits == BLANK else chr(bits) for bits in row) for row in rows]


def sparkline(series: Series, width: int) -> str:
    """The whole series as `width` blocks at most, each as high as the mean of its stretch."""
    if len(series.steps) < 2:
        return ""
    found = [bin.mean for bin in bins(series, series.steps[0], series.steps[-1], width)]
    low, high = min(found), max(found)
    if not high > low:
        return BLOCKS[0] * len(found)
    return "".join(BLOCKS[min(int((value - low) / (high - low) * len(BLOCKS)), len(BLOCKS) - 1)] for value in found)


def plain(text: str) -> str:
    """The same with letters that every terminal has."""
    return text.translate(PLAIN)
