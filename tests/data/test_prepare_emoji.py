"""The script that makes the packaged emoji: the same bytes each time, the same pixels as the archive."""

from __future__ import annotations

import importlib.util
import io
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from zoo.data import RecordReader, open_dataset, open_image, unpack_sample
from zoo.errors import ZooError

SCRIPT = Path(__file__).parents[2] / "examples" / "prepare_emoji.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prepare_emoji", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def pictures() -> dict[str, bytes]:
    """Twelve of the packaged ones, and two with transparency, of whose invisible pixels nothing may be lost."""
    data = open_dataset("emoji", "all")
    found = {data.row(i)["file"]: png(data[i][0]) for i in range(0, 6000, 500)}
    clear = Image.effect_mandelbrot((64, 64), (-3, -2.5, 2, 2.5), 100)
    found["noto/clear.png"] = png(Image.merge("RGBA", (clear, clear, clear, Image.new("L", (64, 64), 0))))
    found["noto/half.png"] = png(Image.merge("RGBA", (clear, clear, clear, clear)))
    return found


def archive(path: Path, pictures: dict[str, bytes], order: int = 1) -> Path:
    rows = [{"file": file, "caption_en": f"caption of {file}", "licence": "MIT"} for file in list(pictures)[::order]]
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("metadata.jsonl", "\n".join(json.dumps(row) for row in rows))
        for file, data in pictures.items():
            packed.writestr(file, data)
    return path


def test_pixels_and_rows_are_those_of_the_archive(script, pictures, tmp_path):
    count = script.prepare(archive(tmp_path / "a.zip", pictures), tmp_path / "a.ffr", progress=False)
    reader = RecordReader(tmp_path / "a.ffr")
    assert count == len(reader) == len(pictures)
    seen = set()
    for record in reader.read(range(count)):
        row, data = unpack_sample(record)
        original, ours = open_image(pictures[row["file"]], mode=None), open_image(data, mode=None)
        assert ours.mode == original.mode and ours.tobytes() == original.tobytes()
        assert len(data) <= len(pictures[row["file"]]) and row["caption_en"] == f"caption of {row['file']}"
        seen.add(row["file"])
    assert seen == set(pictures)


def test_invisible_pixels_survive_in_a_smaller_file(script, pictures):
    for file in ("noto/clear.png", "noto/half.png"):
        kept, _ = script.smallest(pictures[file], file)
        assert kept[:4] == b"RIFF" and len(kept) < len(pictures[file])


def test_an_encoder_that_changes_a_pixel_is_not_believed(script, pictures, monkeypatch):
    original, other = pictures["noto/half.png"], Image.new("RGBA", (64, 64))
    save = Image.Image.save
    monkeypatch.setattr(Image.Image, "save", lambda self, out, *given, **more: save(other, out, *given, **more))
    assert script.smallest(original, "noto/half.png")[0] == original


def test_the_same_archive_gives_the_same_bytes(script, pictures, tmp_path):
    script.prepare(archive(tmp_path / "a.zip", pictures), tmp_path / "a.ffr", progress=False)
    script.prepare(archive(tmp_path / "b.zip", pictures, order=-1), tmp_path / "b.ffr", progress=False)
    assert (tmp_path / "a.ffr").read_bytes() == (tmp_path / "b.ffr").read_bytes()


def test_unusable_archives_are_named_and_leave_nothing(script, pictures, tmp_path):
    (tmp_path / "no.zip").write_bytes(b"no zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    archive(tmp_path / "broken.zip", {**pictures, "noto/1F600.png": b"no picture"})
    for name, message in (("no", "no.zip"), ("nowhere", "nowhere.zip"), ("empty", "empty.zip"), ("broken", "1F600")):
        with pytest.raises(ZooError, match=message):
            script.prepare(tmp_path / f"{name}.zip", tmp_path / "out.ffr", progress=False)
    assert not list(tmp_path.glob("out.ffr*"))


def test_the_command_says_what_it_wrote(script, pictures, tmp_path, monkeypatch, capsys):
    made = archive(tmp_path / "a.zip", dict(list(pictures.items())[:2]))
    monkeypatch.setattr("sys.argv", ["prepare_emoji.py", str(made), str(tmp_path / "a.ffr")])
    assert script.main() == 0 and "2 samples" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["prepare_emoji.py", str(tmp_path / "nowhere.zip"), str(tmp_path / "a.ffr")])
    assert script.main() == 1 and "nowhere.zip" in capsys.readouterr().err
