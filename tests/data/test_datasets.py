"""The packaged emoji: whole, licensed, and divided for ever."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections import Counter, defaultdict

import pytest
import torch
from PIL import Image

from zoo.data import RecordWriter, pack_sample
from zoo.data.datasets import list_datasets, open_dataset, open_pictures, split_by_style
from zoo.errors import EmptyDataset, SettingsError, UnknownDataset

LICENCES = {
    "fluent": "MIT (Microsoft Fluent Emoji)",
    "fluent3d": "MIT (Microsoft Fluent Emoji)",
    "fluentflat": "MIT (Microsoft Fluent Emoji)",
    "noto": "Apache-2.0 (Google Noto Emoji)",
}


def rows(split: str) -> list[dict]:
    data = open_dataset("emoji", split)
    return [data.row(i) for i in range(len(data))]


@pytest.fixture(scope="module")
def everything() -> list[dict]:
    return rows("all")


@pytest.fixture(scope="module")
def test_rows() -> list[dict]:
    return rows("test")


@pytest.fixture(scope="module")
def train_rows() -> list[dict]:
    return rows("train")


# --- the split -------------------------------------------------------------------------------------------------------
def test_the_split_is_fixed_for_ever(everything, train_rows, test_rows):
    """Published results are of this division: whoever changes these numbers makes them incomparable."""
    assert (len(everything), len(train_rows), len(test_rows)) == (6946, 5070, 1876)
    names = "\n".join(sorted(row["file"] for row in test_rows))
    assert (
        hashlib.sha256(names.encode()).hexdigest() == "5f3fd4f599c978bdcae3ddb11d938133aca8fde377418c724d23ace0f86353e8"
    )


def test_every_picture_is_in_one_part(everything, train_rows, test_rows):
    parts = Counter(row["file"] for row in train_rows + test_rows)
    assert parts == Counter(row["file"] for row in everything) and set(parts.values()) == {1}


def test_no_picture_of_the_test_is_known_from_training(train_rows, test_rows):
    tested = Counter(row["pixels"] for row in test_rows)
    assert max(tested.values()) == 1
    assert not tested.keys() & {row["pixels"] for row in train_rows}


def test_one_style_of_each_concept_is_tested_and_another_is_trained(everything, train_rows, test_rows):
    styles, tested = defaultdict(set), {row["hex"]: row["style"] for row in test_rows}
    for row in everything:
        styles[row["hex"]].add(row["style"])
    assert len(tested) == len(test_rows)
    assert tested.keys() == {concept for concept, drawn in styles.items() if len(drawn) >= 2}
    assert {row["hex"] for row in train_rows} == styles.keys()
    assert set(tested.values()) == set(LICENCES)


def test_the_split_depends_on_the_rows_alone(everything):
    split = split_by_style(everything)
    mirrored = split_by_style(everything[::-1])
    assert {everything[i]["file"] for i in split["test"]} == {everything[::-1][i]["file"] for i in mirrored["test"]}
    some = [row for row in everything if row["group"] == "flags"]
    files = {everything[i]["file"] for i in split["test"]}
    assert {some[i]["file"] for i in split_by_style(some)["test"]} == {r["file"] for r in some if r["file"] in files}


# --- the samples -----------------------------------------------------------------------------------------------------
def test_every_sample_says_its_licence(everything):
    assert all(row["licence"] == LICENCES[row["style"]] for row in everything)


def test_every_row_is_complete(everything):
    for row in everything:
        assert row["file"].startswith(row["style"] + "/") and row["hex"] and row["group"] and row["emoji"]
        assert row["caption_en"] and row["caption_zh"] and row["tags_en"] and row["tags_zh"]


def test_pictures_are_the_pixels_that_their_rows_promise():
    data = open_dataset("emoji", "all")
    data.reader.validate()
    for i in range(0, len(data), 37):
        picture, _ = data[i]
        assert picture.size == (64, 64) and picture.mode == "RGB"
        assert hashlib.sha256(picture.convert("RGBA").tobytes()).hexdigest()[:16] == data.row(i)["pixels"]


def test_what_ships_is_sound_or_fails():
    """A stand-in for a damaged sample would move published numbers without a word."""
    assert open_dataset("emoji").on_error == "raise"


def test_pictures_stand_on_white():
    data = open_dataset("emoji", "all")
    corners = [data[i][0].getpixel((0, 0)) for i in range(0, len(data), 37)]
    assert corners.count((255, 255, 255)) > 0.98 * len(corners)


# --- captions --------------------------------------------------------------------------------------------------------
def find(data, file: str) -> int:
    return next(i for i in range(len(data)) if data.row(i)["file"] == file)


@pytest.fixture(scope="module")
def at() -> int:
    return find(open_dataset("emoji", "all"), "noto/1F600.png")


def test_captions_are_english_chinese_none_or_made_by_a_function(at):
    def caption(**settings):
        return open_dataset("emoji", "all", **settings)[at][1]

    assert caption() == caption(language="en") == "grinning face"
    assert caption(language="zh") == "嘿嘿"
    assert caption(language=None) is None
    assert caption(language=lambda row: row["group"]) == "smileys & emotion"


def test_both_languages_come_at_random_and_again_after_the_same_seed(at):
    data = open_dataset("emoji", "all", language="both")

    def draw(seed: int) -> str:
        torch.manual_seed(seed)
        return data[at][1]

    drawn = [draw(seed) for seed in range(40)]
    assert set(drawn) == {"grinning face", "嘿嘿"} and 8 < drawn.count("嘿嘿") < 32
    assert drawn == [draw(seed) for seed in range(40)]


def test_tags_are_drawn_and_follow_the_caption(at):
    data = open_dataset("emoji", "all", tags=2)
    tags = data.row(at)["tags_en"]
    drawn = {data[at][1] for _ in range(20)}
    assert len(drawn) > 1
    for caption in drawn:
        name, first, second = caption.split(", ")
        assert name == "grinning face" and first != second and {first, second} <= set(tags)
    assert open_dataset("emoji", "all", language="zh", tags=99)[at][1].count("，") == 3


def test_one_language_draws_nothing_from_the_random_numbers(at):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    open_dataset("emoji", "all")[at]
    assert torch.equal(torch.rand(1), expected)


def test_samples_pass_transform_and_tokenizer(at):
    data = open_dataset("emoji", "all", transform=lambda picture: picture.size, tokenizer=len)
    assert data[at] == ((64, 64), len("grinning face"))


def test_a_named_set_travels_to_a_worker(at):
    data = open_dataset("emoji", "test", language="both", tags=1)
    again = pickle.loads(pickle.dumps(data))
    assert len(again) == len(data) and again[0][0].tobytes() == data[0][0].tobytes()


# --- pictures alone --------------------------------------------------------------------------------------------------
COLOURS = {"b.png": (1, 2, 3), "a.png": (250, 0, 9), "below/c.png": (40, 50, 60)}


@pytest.fixture
def folder(tmp_path):
    """Three pictures of one colour each, with captions beside them."""
    for name, colour in COLOURS.items():
        path = tmp_path / "pictures" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (5, 4), colour).save(path)
        path.with_suffix(".txt").write_text("a caption")
    return tmp_path / "pictures"


def colour_of(picture: Image.Image) -> tuple[int, ...]:
    return picture.getpixel((0, 0))


def test_pictures_of_a_named_set_are_those_of_the_split_without_captions():
    for split, count in (("train", 5070), ("test", 1876)):
        pictures, pairs = open_pictures("Emoji", split, colour_of), open_dataset("emoji", split, colour_of)
        assert len(pictures) == count
        assert [pictures[i] for i in range(0, count, 500)] == [(pairs[i][0], None) for i in range(0, count, 500)]


def test_pictures_of_a_folder_are_all_below_it_by_name_and_captions_are_not_read(folder):
    for split in ("train", "test"):
        pictures = open_pictures(folder, split, colour_of)
        found = [pictures[i] for i in range(len(pictures))]
        assert found == [(COLOURS[name], None) for name in ("a.png", "b.png", "below/c.png")]
    assert open_pictures(str(folder))[0][0].size == (5, 4)


def test_a_broken_picture_of_a_folder_is_counted_and_the_next_stands_in(folder):
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:40])
    pictures = open_pictures(folder, transform=colour_of)
    with pytest.warns(UserWarning, match="the next sample stands in.*b.png") as warned:
        assert [pictures[i][0] for i in (0, 1, 2, 1)] == [COLOURS[n] for n in ("a.png", *["below/c.png"] * 3)]
    assert list(pictures.bad) == [str(folder / "b.png")] and len(warned) == 1


def test_pictures_of_a_record_file_are_all_in_it_without_captions(folder, tmp_path):
    with RecordWriter(tmp_path / "three.ffr", n=3) as writer:
        for name in COLOURS:
            writer.write_one(pack_sample({"caption": "a caption"}, (folder / name).read_bytes()))
    pictures = open_pictures(tmp_path / "three.ffr", "test", colour_of)
    assert [pictures[i] for i in range(len(pictures))] == [(colour, None) for colour in COLOURS.values()]


def test_what_holds_no_pictures_is_named_with_the_nearest_name(folder, tmp_path):
    for unknown in ("emojis", tmp_path / "gone.ffr", folder / "a.png", folder / "a.txt"):
        with pytest.raises(UnknownDataset, match=f"{unknown}' is no folder, no file of records .*: emoji"):
            open_pictures(unknown)
    with pytest.raises(UnknownDataset, match="nearest: train"):
        open_pictures("emoji", "trian")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmptyDataset, match="no picture in this folder or below"):
        open_pictures(tmp_path / "empty")


# --- names -----------------------------------------------------------------------------------------------------------
def test_unknown_names_and_splits_name_the_nearest():
    assert "emoji" in list_datasets()
    with pytest.raises(UnknownDataset, match="nearest: emoji"):
        open_dataset("emojis")
    with pytest.raises(UnknownDataset, match="nearest: train"):
        open_dataset("emoji", split="trian")
    with pytest.raises(SettingsError, match="'en', 'zh', 'both'"):
        open_dataset("emoji", language="fr")


def test_names_are_found_in_any_case():
    assert len(open_dataset("Emoji", "test")) == 1876


def test_rows_are_plain_json(everything):
    assert json.loads(json.dumps(everything[0])) == everything[0]
