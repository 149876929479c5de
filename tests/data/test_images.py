"""Opening pictures: every unusable one is a BadImage that names it; and records that hold pictures."""

from __future__ import annotations

import io
import random

import pytest
from PIL import Image

from zoo.data.images import open_image, pack_sample, unpack_sample
from zoo.errors import BadImage, BadRecords


def picture(mode: str = "RGB", size: tuple[int, int] = (8, 6)) -> Image.Image:
    noise = Image.frombytes("RGBA", size, random.Random(0).randbytes(size[0] * size[1] * 4))
    return noise.convert(mode)


def encoded(form: str, mode: str = "RGB", **settings) -> bytes:
    out = io.BytesIO()
    picture(mode).save(out, form, **settings)
    return out.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_the_usual_formats_open_from_files_and_bytes(tmp_path, form):
    path = tmp_path / f"a.{form.lower()}"
    path.write_bytes(encoded(form))
    opened = open_image(path)
    assert opened.mode == "RGB" and opened.size == (8, 6)
    assert opened.tobytes() == open_image(memoryview(path.read_bytes())).tobytes() == open_image(str(path)).tobytes()


def test_a_jpeg_of_several_pictures_opens_as_its_first():
    assert open_image(encoded("MPO", save_all=True, append_images=[picture()])).size == (8, 6)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_pictures_come_as_rgb_or_in_their_own_mode(mode):
    data = encoded("PNG", mode)
    assert open_image(data).mode == "RGB"
    own = open_image(data, mode=None)
    assert own.mode == mode and own.tobytes() == picture(mode).tobytes()


@pytest.mark.parametrize(
    "damaged",
    [b"", b"<html>404</html>", encoded("PNG")[:-30], encoded("JPEG")[:-30], encoded("WEBP")[:-30], encoded("PNG")[:20]],
)
def test_damaged_files_are_named(tmp_path, damaged):
    path = tmp_path / "broken.png"
    path.write_bytes(damaged)
    with pytest.raises(BadImage, match=r"broken\.png: not a readable picture"):
        open_image(path)
    with pytest.raises(BadImage, match="from the record: not"):
        open_image(damaged, name="from the record")


@pytest.mark.parametrize("path", ["nowhere.png", ".", "x" * 5000, "null\0byte.png"])
def test_paths_that_lead_nowhere_are_named(tmp_path, path):
    with pytest.raises(BadImage, match="cannot be read"):
        open_image(tmp_path / path)


def test_a_picture_that_would_exhaust_the_memory_is_refused(monkeypatch):
    data = encoded("PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(BadImage, match="bomb: too large"):
        open_image(data, name="bomb")


def test_no_picture_starts_a_program(monkeypatch):
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *given, **more: started.append(given))
    with pytest.raises(BadImage):
        open_image(encoded("EPS"))
    assert not started


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_damage_anywhere_is_a_bad_image_or_a_picture():
    rng = random.Random(0)
    for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        whole = encoded(form)
        for _ in range(60):
            damaged = bytearray(whole)
            for _ in range(rng.choice((1, 4))):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            try:
                assert open_image(bytes(damaged)).mode == "RGB"
            except BadImage:
                pass


def test_a_sample_is_its_row_and_its_picture():
    row, data = {"caption": "日本 😀", "tags": ["a", "b"], "n": 1}, encoded("PNG")
    record = pack_sample(row, data)
    assert record == pack_sample(dict(reversed(row.items())), data)  # the same bytes in whatever order
    again, rest = unpack_sample(memoryview(record))
    assert again == row and bytes(rest) == data
    assert int.from_bytes(record[:4], "little") == len(record) - 4 - len(data)


@pytest.mark.parametrize("record", [b"", b"abc", b"\xff\xff\xff\xffabc", b"\x02\0\0\0[]", b"\x02\0\0\0{x", bytes(9)])
def test_what_is_no_sample_is_refused_by_name(record):
    with pytest.raises(BadRecords, match="part 3"):
        unpack_sample(record, "part 3")
