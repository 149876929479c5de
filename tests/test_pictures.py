"""The map and the grid: sizes, marks, an order of colours that all eyes see, and text that fits."""

from __future__ import annotations

import colorsys

import pytest
from PIL import Image, ImageChops

from zoo import pictures
from zoo.errors import EmptyDataset, SettingsError
from zoo.pictures import BEST, INK, PAPER, SCALE, Label, default, grid, ink_on, shade, similarity_map, wrap

CELL = 72
REDS = [Image.new("RGB", (64, 64), (200, 0, 40 * i)) for i in range(3)]
SCORES = [[0.1, 0.9], [0.7, 0.3], [0.2, 0.8]]


def bare_fonts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pictures, "FONTS", ())
    pictures.fonts.cache_clear()


@pytest.fixture(autouse=True)
def _fonts_of_this_machine():
    yield
    pictures.fonts.cache_clear()


def cells(canvas: Image.Image, columns: int, rows: int) -> list[list[Image.Image]]:
    """The cells of a map without title: the heat begins where the scale's colours do, a cell above the pictures."""
    gap = CELL // 4
    top, left = gap + CELL + gap // 2, canvas.width - gap - columns * CELL
    return [
        [
            canvas.crop((left + c * CELL, top + r * CELL, left + (c + 1) * CELL, top + (r + 1) * CELL))
            for r in range(rows)
        ]
        for c in range(columns)
    ]


def has(picture: Image.Image, colour: tuple[int, int, int]) -> bool:
    return any(found == colour for _, found in picture.getcolors(1 << 20))


def wide_map(**settings) -> Image.Image:
    """Wide enough that the legend does not set the width."""
    return similarity_map(REDS, ["a rather long caption, for its room", "b"], SCORES, cell=CELL, **settings)


def test_the_best_caption_of_each_picture_has_the_only_frames():
    found = cells(wide_map(), 3, 2)
    framed = [
        [cell.getpixel((CELL // 2, 1)) == BEST and cell.getpixel((1, CELL // 2)) == BEST for cell in c] for c in found
    ]
    assert framed == [[False, True], [True, False], [False, True]]
    assert [[has(cell, BEST) for cell in column] for column in found] == framed


def test_a_right_caption_has_a_dot_whether_it_won_or_not():
    plain, dotted = cells(wide_map(), 3, 2), cells(wide_map(right={(0, 1), (1, 1)}), 3, 2)
    differ = [
        [bool(ImageChops.difference(a, b).getbbox()) for a, b in zip(before, after, strict=True)]
        for before, after in zip(plain, dotted, strict=True)
    ]
    assert differ == [[False, True], [False, True], [False, False]]
    assert has(dotted[1][1], BEST) and not has(plain[1][1], BEST)


def test_of_equal_scores_the_first_is_framed_and_what_is_no_number_never():
    found = cells(
        similarity_map(REDS, ["a rather long caption, for its room", "b"], [[1, 1], [float("nan"), 0], [0, 0]]), 3, 2
    )
    assert [[cell.getpixel((CELL // 2, 1)) == BEST for cell in column] for column in found] == [
        [True, False],
        [False, True],
        [True, False],
    ]
    assert found[1][0].getpixel((5, 5)) == pictures.UNKNOWN


def test_cells_have_the_colours_of_their_scores():
    found = cells(wide_map(span=(0, 1)), 3, 2)
    for column, values in zip(found, SCORES, strict=True):
        for cell, value in zip(column, values, strict=True):
            assert cell.getpixel((8, CELL // 2)) == shade(value, 0, 1)


def test_the_value_stands_in_its_cell():
    for column in cells(wide_map(span=(0, 1)), 3, 2):
        for cell in column:
            middle = cell.crop((16, 24, CELL - 16, CELL - 24))
            assert has(middle, INK) or has(middle, PAPER)


def test_pictures_stand_above_their_columns():
    canvas = wide_map()
    left = canvas.width - CELL // 4 - 3 * CELL
    for i, picture in enumerate(REDS):
        assert canvas.getpixel((left + i * CELL + CELL // 2, CELL // 4 + CELL // 2)) == picture.getpixel((0, 0))


def luminance(colour: tuple[int, int, int]) -> float:
    linear = [((x / 255 + 0.055) / 1.055) ** 2.4 if x > 10 else x / 255 / 12.92 for x in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_lightness_falls_all_along_the_scale_in_even_steps():
    light = [116 * luminance(shade(i, 0, 100)) ** (1 / 3) - 16 for i in range(101)]
    assert light == sorted(light, reverse=True)
    anchors = light[::20]
    steps = [anchors[i] - anchors[i + 1] for i in range(5)]
    assert max(steps) - min(steps) < 1


def test_the_frame_is_told_from_the_scale_by_hue_and_text_by_contrast():
    for colour in SCALE[1:]:
        hue = colorsys.rgb_to_hsv(*colour)[0] - colorsys.rgb_to_hsv(*BEST)[0]
        assert 0.3 < hue < 0.7
    for i in range(101):
        fill = shade(i, 0, 100)
        bright, dark = sorted((luminance(fill), luminance(ink_on(fill))), reverse=True)
        assert (bright + 0.05) / (dark + 0.05) > 3.8


def test_scores_outside_the_span_have_the_colours_of_its_ends():
    assert shade(-5, 0, 1) == shade(0, 0, 1) == SCALE[0]
    assert shade(5, 0, 1) == shade(1, 0, 1) == SCALE[-1]
    assert shade(3, 3, 3) == SCALE[0]


LONG = "an extraordinarily long caption " * 12


@pytest.mark.parametrize("text", [LONG, "w" * 400, "长说明文字" * 60, "a " * 200, "one", "", "  ", "\n\t"])
def test_wrapped_text_fits_its_room_and_says_when_it_is_cut(text: str):
    font = default(15)
    lines = wrap(" ".join(text.split()), font, 150, 2)
    assert len(lines) <= 2
    assert all(font.getlength(line) <= 150 for line in lines)
    whole = "".join("".join(lines).split()) == "".join(text.split())
    assert whole != bool(lines and lines[-1].endswith("…"))


def test_a_long_caption_stays_out_of_the_cells_and_of_its_neighbours():
    canvas = similarity_map(REDS, [LONG, LONG], SCORES, cell=CELL)
    gap = CELL // 4
    left, top = canvas.width - gap - 3 * CELL, gap + CELL + gap // 2
    for band in (
        (left - 8, top, left, top + 2 * CELL),
        (0, top + CELL - 6, left, top + CELL + 6),
        (0, top, 6, top + 99),
    ):
        assert canvas.crop(band).getcolors() == [((band[2] - band[0]) * (band[3] - band[1]), PAPER)]


def test_a_script_without_font_is_said_rather_than_drawn_as_boxes(monkeypatch: pytest.MonkeyPatch):
    bare_fonts(monkeypatch)
    label = Label("嘿嘿", 15, 200, 2, "caption 7")
    assert label.missing and label.lines == ["caption 7"]
    known, unknown = (similarity_map(REDS, ["dog", text], SCORES) for text in ("cat", "嘿嘿"))
    assert unknown.height > known.height  # the note below the map


def test_accents_and_typographic_marks_are_written_plainly_where_no_font_has_them(monkeypatch: pytest.MonkeyPatch):
    bare_fonts(monkeypatch)
    label = Label("woman’s café – “déjà vu”", 15, 400, 2, "caption 1")
    assert not label.missing and label.lines == ['woman\'s cafe - "deja vu"']


def test_an_installed_font_writes_what_it_can():
    font = next((font for font in pictures.fonts(15) if pictures.can_write(font, "嘿嘿")), None)
    if font is None:
        pytest.skip("no Chinese font on this machine")
    label = Label("嘿嘿", 15, 200, 2, "caption 1")
    assert not label.missing and label.lines == ["嘿嘿"] and label.font is font


def test_a_map_without_sense_is_refused():
    with pytest.raises(EmptyDataset):
        similarity_map([], ["a"], [])
    with pytest.raises(EmptyDataset):
        similarity_map(REDS, [], [[]] * 3)
    with pytest.raises(SettingsError, match="3 rows of 1"):
        similarity_map(REDS, ["a"], SCORES)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16"])
def test_pictures_of_every_mode_and_shape_are_drawn(mode: str):
    picture = Image.new("RGB", (300, 20), (0, 90, 200)).convert("L" if mode == "I;16" else mode)
    picture = picture.convert(mode) if mode == "I;16" else picture
    assert similarity_map([picture], ["a"], [[1.0]]).size[0] > 0


def test_transparency_shows_the_paper():
    canvas = grid([Image.new("RGBA", (32, 32), (0, 0, 0, 0))], 1)
    assert canvas.getcolors() == [(canvas.width * canvas.height, PAPER)]


@pytest.mark.parametrize(("count", "columns", "shape"), [(5, 2, (2, 3)), (2, 4, (2, 1)), (4, 4, (4, 1))])
def test_a_grid_has_its_columns_and_rows(count: int, columns: int, shape: tuple[int, int]):
    canvas = grid(REDS[:1] * count, columns, cell=60)
    gap = 5
    assert canvas.size == (gap + shape[0] * (60 + gap), gap + shape[1] * (60 + gap))


def test_captions_of_a_grid_stand_below_their_pictures():
    bare, named = grid(REDS, 3, cell=100), grid(REDS, 3, ["one", "two " * 40, "three"], cell=100)
    assert named.height > bare.height and named.width == bare.width
    for i, picture in enumerate(REDS):
        x = 8 + i * 108
        assert named.crop((x, 8, x + 100, 108)).getcolors() == [(10000, picture.getpixel((0, 0)))]
        assert named.crop((x, 109, x + 100, named.height)).convert("L").getextrema()[0] < 100
    for x in (0, 108, 216, 324):  # nothing between them
        assert named.crop((x, 0, x + 8, named.height)).getcolors() == [(8 * named.height, PAPER)]


def test_a_grid_without_sense_is_refused():
    with pytest.raises(EmptyDataset):
        grid([], 3)
    for columns, captions in ((0, None), (2, ["a"])):
        with pytest.raises(SettingsError):
            grid(REDS, columns, captions)
