"""Pictures of results, drawn with Pillow: a map of pictures against captions, and a grid of pictures."""

from __future__ import annotations

import math
import unicodedata
from bisect import bisect_right
from collections.abc import Collection, Sequence
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont, ImageOps

from zoo.errors import EmptyDataset, SettingsError

Colour = tuple[int, int, int]
Font = ImageFont.FreeTypeFont
PAPER, INK, FAINT, UNKNOWN = (255, 255, 255), (33, 37, 41), (108, 117, 125), (206, 212, 218)
BEST = (232, 89, 12)  # orange: far from the scale's blues for every kind of colour vision

# Low to high. Lightness falls from 98 to 16 (CIE L*) in even steps, so the order reads without red, green or any hue.
SCALE = ((248, 249, 248), (174, 210, 208), (99, 168, 189), (45, 121, 175), (26, 77, 135), (15, 37, 89))

# Pillow looks these names up where each system keeps its fonts. First wide Latin, Greek and Cyrillic, then Chinese,
# Japanese and Korean: Debian, Fedora and Arch, macOS, Windows.
FONTS = (
    *("DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial.ttf", "segoeui.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJK-VF.ttc", "NotoSansCJKsc-Regular.otf", "SourceHanSansCN-Regular.otf"),
    *("wqy-zenhei.ttc", "wqy-microhei.ttc", "DroidSansFallbackFull.ttf", "uming.ttc"),
    *("PingFang.ttc", "Hiragino Sans GB.ttc", "STHeiti Medium.ttc", "Arial Unicode.ttf"),
    *("msyh.ttc", "simhei.ttf", "simsun.ttc"),
)
NO_FONT = "Captions named by number are in a script that no font on this machine can write; install a Noto CJK font."
_PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "×": "x"})


def similarity_map(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    scores: Sequence[Sequence[float]],
    *,
    right: Collection[tuple[int, int]] = (),
    title: str = "",
    form: str = "{:.2f}",
    span: tuple[float, float] | None = None,
    cell: int = 72,
) -> Image.Image:
    """Pictures as columns, captions as rows, `scores[picture][caption]` in the cells: darker is higher.

    The best caption of each picture has an orange frame; of equal scores, the first. `right` are the pairs (picture,
    caption) known to belong together, marked with a dot. `form` writes a score, `span` is the range of the colours (by
    default that of the scores), `cell` the side of a cell in pixels. A caption that no font on this machine can write
    is named by its number instead, with a note below the map.

    Raises EmptyDataset without pictures or captions, SettingsError when `scores` has another shape.
    """
    if not images or not captions:
        raise EmptyDataset(f"a map needs pictures and captions; there are {len(images)} and {len(captions)}")
    table = [[float(score) for score in row] for row in scores]
    if len(table) != len(images) or any(len(row) != len(captions) for row in table):
        raise SettingsError(f"scores must be {len(images)} rows of {len(captions)}, one row per picture")
    known = [score for row in table for score in row if math.isfinite(score)]
    low, high = span or (min(known, default=0.0), max(known, default=0.0))

    gap, size = cell // 4, max(9, round(cell * 0.2))
    labels = [Label(caption, size, cell * 4, 2, f"caption {i + 1}") for i, caption in enumerate(captions)]
    left = gap * 2 + math.ceil(max(label.width for label in labels))
    top = gap + (size * 2 if title else 0) + cell + gap // 2
    bottom = top + cell * len(captions)
    legend = Legend(form.format(low), form.format(high), bool(right), any(label.missing for label in labels), size)
    width = max(left + cell * len(images), gap + math.ceil(legend.width)) + gap
    canvas = Image.new("RGB", (width, bottom + gap + legend.height + gap), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        Label(title, round(size * 1.25), width - gap * 2, 1).draw(draw, gap, gap * 0.6, "la")
    for column, picture in enumerate(images):
        paste(canvas, picture, (left + column * cell + 2, top - cell - gap // 2 + 2, cell - 4))
    for row, label in enumerate(labels):
        label.draw(draw, left - gap * 0.6, top + (row + 0.5) * cell, "rm")
    for column, values in enumerate(table):
        best = max(range(len(values)), key=lambda row: (math.isfinite(values[row]), values[row]))
        for row, value in enumerate(values):
            box = (left + column * cell, top + row * cell, left + (column + 1) * cell - 2, top + (row + 1) * cell - 2)
            draw_cell(canvas, box, form.format(value), shade(value, low, high), row == best, (column, row) in right)
    legend.draw(canvas, gap, bottom + gap)
    return canvas


def grid(
    images: Sequence[Image.Image], columns: int, captions: Sequence[str] | None = None, *, cell: int = 160
) -> Image.Image:
    """Pictures in rows of `columns`, each fitted into a square of `cell` pixels, its caption below in two lines.

    Raises EmptyDataset without pictures, SettingsError when captions are not one per picture.
    """
    if not images:
        raise EmptyDataset("a grid needs pictures; there are none")
    if columns < 1 or (captions is not None and len(captions) != len(images)):
        raise SettingsError(f"{len(images)} pictures need {len(images)} captions or none, and one column or more")
    gap, size = max(4, cell // 12), max(10, cell // 11)
    labels = [Label(text, size, cell, 2, f"caption {i + 1}") for i, text in enumerate(captions or ())]
    below = max((label.height + gap // 2 for label in labels), default=0)
    note = Label(NO_FONT, size, (cell + gap) * columns, 4) if any(label.missing for label in labels) else None
    columns, rows = min(columns, len(images)), math.ceil(len(images) / columns)
    step = cell + below + gap
    height = gap + rows * step + (note.height + gap if note else 0)
    canvas = Image.new("RGB", (gap + columns * (cell + gap), height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for i, picture in enumerate(images):
        x, y = gap + i % columns * (cell + gap), gap + i // columns * step
        paste(canvas, picture, (x, y, cell))
        if labels:
            labels[i].draw(draw, x + cell / 2, y + cell + gap // 2, "ma")
    if note:
        note.draw(draw, gap, gap + rows * step, "la")
    return canvas


# --- parts -----------------------------------------------------------------------------------------------------------
def shade(value: float, low: float, high: float) -> Colour:
    """The colour of a score between `low` and `high`; outside it is that of the nearer end, grey if not a number."""
    if not math.isfinite(value):
        return UNKNOWN
    place = min(max((value - low) / (high - low), 0.0), 1.0) if high > low else 0.0
    step = min(int(place * (len(SCALE) - 1)), len(SCALE) - 2)
    part = place * (len(SCALE) - 1) - step
    return tuple(round(a + (b - a) * part) for a, b in zip(SCALE[step], SCALE[step + 1], strict=True))


def ink_on(fill: Colour) -> Colour:
    """The colour of text on `fill`: whichever of the two contrasts more (Rec. 601 luma; they are level at 118)."""
    return INK if fill[0] * 0.299 + fill[1] * 0.587 + fill[2] * 0.114 > 118 else PAPER


def draw_cell(
    canvas: Image.Image, box: tuple[int, int, int, int], text: str, fill: Colour, best: bool, right: bool
) -> None:
    """A score on its colour, with a frame if it is the best of its picture and a dot if it is right."""
    draw = ImageDraw.Draw(canvas)
    draw.rectangle(box, fill=fill)
    side = box[2] - box[0]
    if best:
        draw.rectangle(box, outline=BEST, width=max(2, side // 20))
    draw.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), text, ink_on(fill), default(side // 4), "mm")
    if right:
        draw_dot(canvas, box[2] - side * 0.18, box[1] + side * 0.18, side * 0.07)


def draw_dot(canvas: Image.Image, x: float, y: float, radius: float) -> None:
    """The mark of a right answer, with a rim of paper so that it is seen on any colour."""
    fine = 8  # drawn so many times larger and scaled down, since Pillow's circles have hard edges
    for colour, reach in ((PAPER, radius * 1.35), (BEST, radius)):
        side = math.ceil(reach) * 2 + 1
        mask, middle = Image.new("L", (side * fine, side * fine)), side * fine / 2
        ImageDraw.Draw(mask).ellipse((middle - reach * fine, middle - reach * fine) + (middle + reach * fine,) * 2, 255)
        mask = mask.resize((side, side), Image.Resampling.BOX)
        canvas.paste(colour, (round(x) - side // 2, round(y) - side // 2), mask)


def paste(canvas: Image.Image, picture: Image.Image, place: tuple[int, int, int]) -> None:
    """A picture, fitted into the square (x, y, side); what is transparent shows the paper."""
    x, y, side = place
    picture = ImageOps.contain(picture.convert("RGBA"), (side, side), Image.Resampling.LANCZOS)
    canvas.paste(picture, (x + (side - picture.width) // 2, y + (side - picture.height) // 2), picture)


class Legend:
    """The range of the colours and the meaning of the marks, below a map."""

    def __init__(self, low: str, high: str, dots: bool, missing: bool, size: int) -> None:
        self.low, self.high, self.dots, self.size = low, high, dots, size
        self.font = default(size)
        self.note = Label(NO_FONT, size, size * 28, 3) if missing else None
        marks = ["best caption", "right caption"] if dots else ["best caption"]
        marks = sum(self.font.getlength(mark) + size * 3 for mark in marks)
        self.width = max(self.bar_end + marks, self.note.width if self.note else 0)
        self.height = size * 2 + (self.note.height + size // 2 if self.note else 0)

    @property
    def bar_end(self) -> float:
        """Where the marks may begin."""
        return self.font.getlength(self.low) + self.font.getlength(self.high) + self.size * 9

    def draw(self, canvas: Image.Image, x: float, y: float) -> None:
        """From (x, y) on, to the right and down."""
        draw = ImageDraw.Draw(canvas)
        size, middle, end = self.size, y + self.size, x + self.bar_end
        draw.text((x, middle), self.low, FAINT, self.font, "lm")
        start, length = round(x + self.font.getlength(self.low) + size * 0.5), size * 6
        for i in range(length):
            draw.line((start + i, y + size * 0.5, start + i, y + size * 1.5), shade(i, 0, length - 1))
        draw.text((start + length + size * 0.5, middle), self.high, FAINT, self.font, "lm")
        draw.rectangle((end, y + size * 0.5, end + size, y + size * 1.5), outline=BEST, width=2)
        draw.text((end + size * 1.4, middle), "best caption", FAINT, self.font, "lm")
        if self.dots:
            end += size * 3 + self.font.getlength("best caption")
            draw_dot(canvas, end, middle, size * 0.35)
            draw.text((end + size * 0.8, middle), "right caption", FAINT, self.font, "lm")
        if self.note:
            self.note.draw(draw, x, y + size * 2, "la")


# --- text ------------------------------------------------------------------------------------------------------------
class Label:
    """A text in a font that can write it, in at most `lines` lines of `room` pixels; `instead` where no font can."""

    def __init__(self, text: str, size: int, room: float, lines: int, instead: str = "") -> None:
        text = "".join(c for c in " ".join(text.split()) if unicodedata.category(c) not in ("Cc", "Cf"))
        found = next((font for font in fonts(size) if can_write(font, text)), None)
        if found is None:
            text = unicodedata.normalize("NFKD", text.translate(_PLAIN))
            text = "".join(c for c in text if not unicodedata.combining(c))
        self.missing = found is None and not can_write(default(size), text)
        self.font = found or default(size)
        self.lines = wrap(instead if self.missing else text, self.font, room, lines)
        self.colour = FAINT if self.missing else INK
        self.width = max((self.font.getlength(line) for line in self.lines), default=0)
        self.line_height = round(size * 1.3)
        self.height = self.line_height * len(self.lines)

    def draw(self, draw: ImageDraw.ImageDraw, x: float, y: float, anchor: str) -> None:
        """At (x, y): the anchor's first letter is l, m or r, its second a (top) or m (middle)."""
        first = y - (self.height / 2 if anchor[1] == "m" else 0)
        for i, line in enumerate(self.lines):
            draw.text((x, first + (i + 0.5) * self.line_height), line, self.colour, self.font, anchor[0] + "m")


@lru_cache(maxsize=64)
def default(size: int) -> Font:
    """Pillow's own font: Latin without accents."""
    return ImageFont.load_default(max(size, 6))


@lru_cache(maxsize=16)
def fonts(size: int) -> tuple[Font, ...]:
    """Pillow's own font, then those of `FONTS` that this machine has."""
    found = [default(size)]
    for name in FONTS:
        try:
            found.append(ImageFont.truetype(name, size))
        except OSError:  # not on this machine
            continue
    return tuple(found)


def can_write(font: Font, text: str) -> bool:
    """Whether the font has every letter: what it lacks is drawn like a code point that nothing has."""
    lacking = bytes(font.getmask("\U0010ffff"))
    return all(c.isspace() or bytes(font.getmask(c)) != lacking for c in set(text))


def wrap(text: str, font: Font, room: float, lines: int) -> list[str]:
    """Text in at most `lines` lines that fit into `room` pixels; what is cut off is shown as an ellipsis. Lines break
    at blanks, and within a word where it is longer than a line or wide, as Chinese is."""
    words: list[str] = []
    for word in text.split(" "):
        parts = list(word) if any(unicodedata.east_asian_width(c) in "WF" for c in word) else [word]
        words += [*parts[:-1], parts[-1] + " "]
    made = [""]
    for word in words:
        while word and len(made) <= lines and font.getlength((made[-1] + word).rstrip()) > room:
            if not made[-1]:
                made[-1], word = split_at(word, font, room)
            made.append("")
        made[-1] += word
    made = [line.rstrip() for line in made if line.strip()]
    if len(made) > lines:
        made, last = made[:lines], made[lines - 1]
        while last and font.getlength(last.rstrip() + "…") > room:
            last = last[:-1]
        made[-1] = last.rstrip() + "…"
    return made


def split_at(word: str, font: Font, room: float) -> tuple[str, str]:
    """As much of the word as fits into `room` pixels, one letter at least, and the rest."""
    fits = max(1, bisect_right(range(1, len(word)), room, key=lambda n: font.getlength(word[:n])))
    return word[:fits], word[fits:]
