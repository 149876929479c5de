"""The picture of curves: a value is drawn where its axis says, nothing is clipped, and each run has its colour."""

from __future__ import annotations

import random

import pytest
from PIL import Image

from zoo.errors import EmptyDataset
from zoo.pictures import PAPER
from zoo.plots.panels import COLOURS, FRAME, Head, Panel, colour_of, draw, pale, place
from zoo.plots.series import Series

STEPS = list(range(0, 1001, 10))
NOISE = random.Random(1)
NOISY = Series(STEPS, [2 + NOISE.gauss(0, 1) for _ in STEPS])


def flat(value: float) -> Series:
    return Series(STEPS, [value] * len(STEPS))


def near(a: tuple[int, int, int], b: tuple[int, int, int], within: int = 60) -> bool:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True)) <= within


def spots(panels: list[Panel], names: list[str], title: str = "") -> list:
    return place(panels, Head(panels, names, title, 0.01).height)


def rows_of(canvas: Image.Image, x: int, colour: tuple[int, int, int], top: int, bottom: int) -> list[int]:
    return [y for y in range(top, bottom + 1) if near(canvas.getpixel((x, y)), colour)]


@pytest.mark.parametrize("log", [False, True])
def test_a_value_is_drawn_at_the_pixel_of_its_axis(log: bool):
    # A run at each of the values, and one that stretches the axis, logarithmic if it has a few large ones.
    stretch = Series([0, 1, 2, 3], [1.0, 1.0, 1.0, 900.0 if log else 9.0])
    panels = [Panel("loss", {"stretch": stretch, **{str(v): flat(v) for v in (2.0, 5.0, 7.5)}})]
    names = ["stretch", "2.0", "5.0", "7.5"]
    [spot], canvas = spots(panels, names), draw(panels, names)
    assert spot.y.log is log
    for value in (2.0, 5.0, 7.5):
        rows = rows_of(
            canvas, round(spot.x.place(700)), colour_of(names, str(value)), *map(round, (spot.y.end, spot.y.start))
        )
        assert rows and abs(sum(rows) / len(rows) - spot.y.place(value)) <= 1


def test_a_step_is_drawn_at_the_pixel_of_its_axis():
    jump = Series([0, 400, 405, 1000], [0, 0, 1, 1])
    panels = [Panel("loss", {"a": jump})]
    [spot], canvas = spots(panels, ["a"]), draw(panels, ["a"])
    middle = round((spot.y.start + spot.y.end) / 2) + 3
    row = [x for x in range(round(spot.x.start) + 3, canvas.width) if near(canvas.getpixel((x, middle)), COLOURS[0])]
    assert row and abs(sum(row) / len(row) - spot.x.place(402.5)) <= 1


def test_dots_are_round_where_the_values_are_and_whole_at_the_edges():
    panels = [Panel("eval/recall", {}, {"a": Series([0, 500, 1000], [0.0, 0.5, 1.0])})]
    [spot], canvas = spots(panels, ["a"]), draw(panels, ["a"])
    for step, value in ((0, 0.0), (500, 0.5), (1000, 1.0)):
        x, y = round(spot.x.place(step)), round(spot.y.place(value))
        for dx, dy in ((0, 0), (2, 2), (-2, 2), (2, -2), (-2, -2)):
            assert near(canvas.getpixel((x + dx, y + dy)), COLOURS[0])
    x = round(spot.x.place(1000))
    assert near(canvas.getpixel((x + 3, round(spot.y.place(1.0)))), COLOURS[0])  # beyond the frame


def test_the_smoothed_line_stands_over_the_pale_one_of_the_values():
    panels = [Panel("loss", {"a": NOISY})]
    canvas, bare = draw(panels, ["a"]), draw(panels, ["a"], smoothing=0)

    def count(picture: Image.Image, colour: tuple[int, int, int]) -> int:
        return sum(n for n, found in picture.getcolors(1 << 20) if near(found, colour, 12))

    assert count(canvas, pale(COLOURS[0])) > 500 and count(canvas, COLOURS[0]) > 300
    assert count(bare, COLOURS[0]) > 2 * count(canvas, COLOURS[0])  # the values themselves are the thick line


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_panels_have_one_size_and_nothing_is_cut_off_at_the_edges(count: int):
    names = [f"a rather long name of a run, number {i}" for i in range(4)]
    panels = [
        Panel(f"eval/a-long-name-of-a-number-that-goes-on-and-on-{i}", {n: flat(-123456.789 * 10**i) for n in names})
        for i in range(count)
    ]
    canvas = draw(panels, names, title="title " * 60)
    for box in ((0, 0, canvas.width, 5), (0, 0, 3, canvas.height), (0, canvas.height - 5, *canvas.size)):
        assert canvas.crop(box).getcolors() == [((box[2] - box[0]) * (box[3] - box[1]), PAPER)]
    right = canvas.crop((canvas.width - 3, 0, *canvas.size))
    assert right.getcolors() == [(3 * canvas.height, PAPER)]
    placed = spots(panels, names, "title " * 60)
    assert len({(spot.x.end - spot.x.start, spot.y.start - spot.y.end) for spot in placed}) == 1
    for spot in placed:
        assert near(canvas.getpixel((round(spot.x.start), round(spot.y.end) + 40)), FRAME, 0)


def test_a_run_has_one_colour_and_the_legend_shows_all():
    names = [f"run {i}" for i in range(8)]
    panels = [Panel("loss", {name: flat(i) for i, name in enumerate(names)})]
    head = Head(panels, names, "", 0.01)
    legend = draw(panels, names).crop((0, 0, head.width, head.height))
    colours = {found for _, found in legend.getcolors(1 << 20)}
    assert set(COLOURS) <= colours and len({colour_of(names, name) for name in names}) == 8


@pytest.mark.parametrize(
    "series",
    [Series([], []), Series([5], [1.0]), Series([1, 2], [float("nan"), float("inf")]), Series([1, 2], [1e-300, 1e300])],
)
def test_odd_series_are_drawn(series: Series):
    assert draw([Panel("a", {"r": series}), Panel("b", {}, {"r": series})], ["r"]).width > 0


def test_nothing_to_draw_is_refused():
    with pytest.raises(EmptyDataset):
        draw([], [])
