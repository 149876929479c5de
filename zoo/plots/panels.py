"""Curves in a picture, drawn with Pillow: one panel for each number, all over the same steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

from zoo.errors import EmptyDataset
from zoo.pictures import FAINT, PAPER, Colour, Label, default

from .axis import Axis, axis_for, number_text
from .series import Bin, Series, bins, finite, smooth

# Blue, orange, green, violet, ochre, red, black, sky: neighbours differ in lightness or warmth, not in red and green.
COLOURS = (
    *((28, 101, 178), (232, 106, 16), (10, 138, 104), (136, 82, 184)),
    *((176, 132, 0), (204, 40, 80), (60, 64, 72), (70, 165, 220)),
)
GRID, FRAME = (233, 236, 239), (173, 181, 189)
FINE = 3  # lines are drawn so many times larger and scaled down, since Pillow's have hard edges
SIZE = 14  # of letters, in pixels
GAP, LEFT, TOP, BOTTOM = 24, 62, 30, 24  # around a panel's frame: to the next, for its numbers, name and steps
WIDTH, HEIGHT = 480, 230  # of a frame
EDGE = 6  # what a dot at its edge needs beyond it
LINE, DOT = 2.0, 4.0  # a line's width, a dot's radius


@dataclass(frozen=True)
class Panel:
    """What one panel shows: by run, values at every step (`lines`), and values at few (`dots`)."""

    title: str
    lines: Mapping[str, Series]
    dots: Mapping[str, Series] = field(default_factory=dict)


@dataclass(frozen=True)
class Placed:
    """A panel with its two axes, whose places are pixels of the whole picture. y is None where there is no value."""

    panel: Panel
    x: Axis
    y: Axis | None


def draw(panels: Sequence[Panel], names: Sequence[str], *, title: str = "", smoothing: float = 0.01) -> Image.Image:
    """The panels in one to three columns, below a title and the colours of the runs `names`.

    A thin line is the values as they are; where a pixel holds many, from the lowest to the highest. The thick one is
    their mean, of which a value that share `smoothing` of all steps away weighs 1/e.

    Raises EmptyDataset without panels.
    """
    if not panels:
        raise EmptyDataset("a plot needs something to draw; there are no panels")
    panels = [cleaned(panel) for panel in panels]
    head = Head(panels, names, title, smoothing)
    placed = place(panels, head.height)
    columns, rows = shape(len(panels))
    canvas = Image.new("RGB", (canvas_width(columns), head.height + rows * (TOP + HEIGHT + BOTTOM + GAP)), PAPER)
    head.draw(canvas)
    for spot in placed:
        draw_axes(canvas, spot)
        draw_values(canvas, spot, names, smoothing)
        draw_name(canvas, spot, names)
    return canvas


def shape(count: int) -> tuple[int, int]:
    """Columns and rows for so many panels."""
    columns = 1 if count == 1 else 2 if count <= 6 else 3
    return columns, math.ceil(count / columns)


def canvas_width(columns: int) -> int:
    """Pixels from edge to edge."""
    return columns * (LEFT + WIDTH + GAP)


def place(panels: Sequence[Panel], top: int) -> list[Placed]:
    """Gives each panel its axes: the steps of all, the values of its own."""
    last = max((s.steps[-1] for p in panels for s in (*p.lines.values(), *p.dots.values()) if len(s.steps)), default=1)
    columns, _ = shape(len(panels))
    placed = []
    for number, panel in enumerate(panels):
        left = LEFT + number % columns * (LEFT + WIDTH + GAP)
        upper = top + TOP + number // columns * (TOP + HEIGHT + BOTTOM + GAP)
        values = [value for s in (*panel.lines.values(), *panel.dots.values()) for value in s.values]
        y = axis_for(values, upper + HEIGHT, upper) if values else None
        placed.append(Placed(panel, Axis(0, max(last, 1), left, left + WIDTH), y))
    return placed


def cleaned(panel: Panel) -> Panel:
    """The panel without what is no finite number."""
    lines, dots = ({name: finite(s) for name, s in some.items()} for some in (panel.lines, panel.dots))
    return Panel(panel.title, lines, dots)


# --- parts -----------------------------------------------------------------------------------------------------------
def draw_axes(canvas: Image.Image, spot: Placed) -> None:
    """The lines of the axes, round numbers beside them, and a faint line across for each."""
    draw, font, x, y = ImageDraw.Draw(canvas), default(SIZE - 2), spot.x, spot.y
    if y is None:
        return
    for tick, text in y.ticks(6):
        row = round(y.place(tick))
        draw.line((x.start, row, x.end, row), GRID)
        draw.text((x.start - 7, row), text, FAINT, font, "rm")
    for tick, text in x.ticks(8):
        column = round(x.place(tick))
        draw.line((column, y.end, column, y.start), GRID)
        draw.text((column, y.start + 7), text if tick else "step 0", FAINT, font, "ma")
    draw.line((x.start, y.end, x.start, y.start, x.end, y.start), FRAME)


def draw_values(canvas: Image.Image, spot: Placed, names: Sequence[str], smoothing: float) -> None:
    """The curves and dots, which may reach over the frame's edge by half their width."""
    if spot.y is None:
        return
    corner = (round(spot.x.start) - EDGE, round(spot.y.end) - EDGE)
    size = (WIDTH + 2 * EDGE + 1, HEIGHT + 2 * EDGE + 1)
    # The middle of a pixel of the canvas is that of FINE x FINE of the layer's.
    near, middle = EDGE * FINE, FINE // 2
    x = Axis(spot.x.low, spot.x.high, near + middle, near + middle + WIDTH * FINE)
    y = Axis(spot.y.low, spot.y.high, near + middle + HEIGHT * FINE, near + middle, spot.y.log)
    layer = canvas.crop((*corner, corner[0] + size[0], corner[1] + size[1]))
    layer = layer.resize((size[0] * FINE, size[1] * FINE), Image.Resampling.NEAREST)
    brush = ImageDraw.Draw(layer)
    courses = [(colour_of(names, name), s) for name, s in spot.panel.lines.items() if len(s.steps)]
    for colour, series in courses if smoothing else ():
        stroke(brush, list(extent(series, x, y)), pale(colour), round(LINE * FINE / 2))
    for colour, series in courses:
        course = smooth(series, smoothing * x.high)
        points = [(x.place(b.step), y.place(b.mean)) for b in binned(course, x)]
        stroke(brush, points, colour, round(LINE * FINE))
    for name, series in spot.panel.dots.items():
        draw_dots(brush, [(x.place(s), y.place(v)) for s, v in zip(*series, strict=True)], colour_of(names, name))
    canvas.paste(layer.resize(size, Image.Resampling.BOX), corner)


def binned(series: Series, x: Axis) -> list[Bin]:
    """One bin for each pixel of the width at most."""
    return bins(series, x.low, x.high, WIDTH)


def extent(series: Series, x: Axis, y: Axis) -> Iterator[tuple[float, float]]:
    """The points of a line that reaches, in each pixel, from the lowest value to the highest."""
    for number, stretch in enumerate(binned(series, x)):
        ends = (stretch.low, stretch.high) if number % 2 else (stretch.high, stretch.low)
        for value in ends if stretch.low != stretch.high else ends[:1]:
            yield x.place(stretch.step), y.place(value)


def stroke(brush: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: Colour, width: int) -> None:
    """A line through the points; one alone is a dot."""
    brush.line(points, colour, width, joint="curve")
    for x, y in points if len(points) == 1 else ():
        brush.ellipse((x - width, y - width, x + width, y + width), colour)


def draw_dots(brush: ImageDraw.ImageDraw, points: list[tuple[float, float]], colour: Colour) -> None:
    """Dots with a rim of paper, joined by a thin line; without dots where they would touch."""
    brush.line(points, colour, FINE)
    if len(points) * DOT * 3 > WIDTH:
        return
    for reach, fill in ((DOT + 1.5, PAPER), (DOT, colour)):
        for x, y in points:
            far = reach * FINE
            brush.ellipse((x - far, y - far, x + far, y + far), fill)


def draw_name(canvas: Image.Image, spot: Placed, names: Sequence[str]) -> None:
    """The panel's name above the frame, and the last value of each run while there is room."""
    draw, left, right = ImageDraw.Draw(canvas), spot.x.start, spot.x.end
    if spot.y is None:
        return
    top = spot.y.end
    title = Label(spot.panel.title, SIZE, WIDTH * 0.6, 1)
    title.draw(draw, left, top - 15, "lm")
    if spot.y.log:
        draw.text((left + title.width + 8, top - 14), "log scale", FAINT, default(SIZE - 3), "lm")
    end, least = right, left + title.width + 80
    last = [(n, s.values[-1]) for n, s in (spot.panel.lines or spot.panel.dots).items() if len(s.steps)]
    for name, value in reversed(last):
        text = number_text(value)
        end -= default(SIZE).getlength(text)
        if end < least:
            break
        draw.text((end, top - 15), text, colour_of(names, name), default(SIZE), "lm")
        end -= 12


class Head:
    """The title, and below it what the colours and lines mean, in as many rows as that takes."""

    def __init__(self, panels: Sequence[Panel], names: Sequence[str], title: str, smoothing: float) -> None:
        columns, _ = shape(len(panels))
        self.width = canvas_width(columns) - GAP
        self.title = Label(title, SIZE + 4, self.width - GAP, 1) if title else None
        keys: list[tuple[str, Colour, str]] = []
        if len(names) > 1:
            keys += [("line", colour_of(names, name), name) for name in names]
        one = colour_of(names, names[0]) if len(names) == 1 else FAINT
        if any(panel.lines for panel in panels) and smoothing:
            keys += [("thin", pale(one), "as logged"), ("line", one, "smoothed")]
        if any(panel.dots for panel in panels):
            keys.append(("dot", one, "evaluation"))
        self.keys = [(mark, colour, Label(text, SIZE - 1, self.width / 2, 1)) for mark, colour, text in keys]
        self.top = GAP // 2 + (self.title.height if self.title else 0)
        self.rows = self._rows()
        self.height = self.top + len(self.rows) * (SIZE + 8) + GAP // 2

    def _rows(self) -> list[list[tuple[str, Colour, Label]]]:
        rows, used = [], math.inf
        for key in self.keys:
            used += 58 + key[2].width
            if used > self.width:
                rows.append([])
                used = 58 + key[2].width
            rows[-1].append(key)
        return rows

    def draw(self, canvas: Image.Image) -> None:
        """At the top of the canvas."""
        draw, left = ImageDraw.Draw(canvas), GAP
        if self.title:
            self.title.draw(draw, left, GAP // 2, "la")
        for number, row in enumerate(self.rows):
            x, y = left, self.top + number * (SIZE + 8) + (SIZE + 8) / 2
            for mark, colour, label in row:
                draw_key(canvas, x, y, mark, colour)
                label.draw(draw, x + 34, y, "lm")
                x += 58 + label.width


def draw_key(canvas: Image.Image, x: float, y: float, mark: str, colour: Colour) -> None:
    """A piece of the line, or a dot, as the legend shows it."""
    corner, size = (round(x), round(y) - 7), (28, 14)
    layer = Image.new("RGB", (size[0] * FINE, size[1] * FINE), PAPER)
    brush, middle, end = ImageDraw.Draw(layer), size[1] * FINE / 2, size[0] * FINE
    if mark == "dot":
        brush.line((0, middle, end, middle), colour, FINE)
        far = DOT * FINE
        brush.ellipse((end / 2 - far, middle - far, end / 2 + far, middle + far), colour)
    else:
        brush.line((0, middle, end, middle), colour, round(LINE * FINE / (2 if mark == "thin" else 1)))
    canvas.paste(layer.resize(size, Image.Resampling.BOX), corner)


def colour_of(names: Sequence[str], name: str) -> Colour:
    """The colour of a run, the same in all panels."""
    return COLOURS[names.index(name) % len(COLOURS)]


def pale(colour: Colour) -> Colour:
    """The same, most of the way to the paper."""
    return tuple(round(paper + (ink - paper) * 0.32) for ink, paper in zip(colour, PAPER, strict=True))
