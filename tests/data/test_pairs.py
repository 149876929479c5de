"""Pairs of pictures and captions: as FlagAI's, and with bad files neither fatal nor silent."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from zoo.data.images import pack_sample
from zoo.data.pairs import CsvDataset, FolderDataset, RecordDataset, collate_fn
from zoo.data.records import RecordWriter
from zoo.data.transforms import clip_transform
from zoo.errors import BadImage, BadRecords, BadTable, EmptyDataset, SettingsError

COLOURS = ["red", "green", "blue", "white", "black"]


class Tokenizer:
    """One token per letter, as CLIP's in shape."""

    def tokenize_as_tensor(self, texts, context_length=77):
        tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = torch.tensor([ord(c) for c in text])
        return tokens


def to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def table(folder: Path, rows: list[str], name: str = "pairs.csv") -> Path:
    (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder / name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for colour in COLOURS:
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{colour}.png")
        (tmp_path / f"{colour}.txt").write_text(f"a {colour} square\n", encoding="utf-8")
    table(tmp_path, ["title\tfilepath", *(f"a {c} square\t{c}.png" for c in COLOURS)])
    return tmp_path


@pytest.fixture
def records(folder: Path) -> Path:
    with RecordWriter(folder / "pairs.ffr", len(COLOURS)) as writer:
        for colour in COLOURS:
            picture = (folder / f"{colour}.png").read_bytes()
            writer.write_one(pack_sample({"caption": f"a {colour} square", "colour": colour}, picture))
    return folder / "pairs.ffr"


def all_kinds(folder: Path, records: Path, *given) -> list:
    return [
        CsvDataset(folder / "pairs.csv", folder, *given),
        FolderDataset(folder, *given),
        RecordDataset(records, *given),
    ]


def test_the_names_of_the_room_are_there():
    import zoo.data

    assert all(callable(getattr(zoo.data, name)) for name in zoo.data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'CsvDatset'"):
        zoo.data.CsvDatset  # noqa: B018


# --- samples and batches ---------------------------------------------------------------------------------------------
def test_every_kind_gives_the_same_samples(folder, records):
    for data in all_kinds(folder, records, to_tensor, Tokenizer()):
        assert len(data) == 5
        found = {"".join(map(chr, text[text > 0])): image for image, text in (data[i] for i in range(5))}
        assert found.keys() == {f"a {c} square" for c in COLOURS}
        assert torch.equal(found["a red square"], torch.tensor([1.0, 0, 0]).view(3, 1, 1).expand(3, 4, 4))
        assert data[0][1].dtype == torch.int64 and data[0][1].shape == (77,)


def test_without_transform_and_tokenizer_pictures_and_captions_come_as_they_are(folder, records):
    for data in all_kinds(folder, records, None, None):
        picture, caption = data[-1]
        assert isinstance(picture, Image.Image) and picture.size == (4, 4)
        assert caption == data[4][1] and caption.startswith("a ")
        for i in (5, -6):
            with pytest.raises(IndexError):
                data[i]


def test_the_transform_meets_the_picture_in_its_own_mode(folder, records):
    Image.new("LA", (4, 4)).save(folder / "red.png")
    assert CsvDataset(folder / "pairs.csv", folder, lambda picture: picture.mode, None)[0][0] == "LA"


def test_a_tokenizer_may_be_a_function(folder):
    data = CsvDataset(folder / "pairs.csv", folder, to_tensor, lambda text: torch.tensor([len(text)]))
    assert data[0][1].tolist() == [len("a red square")]


def test_batches_are_what_the_trainer_takes(folder, records):
    for data in all_kinds(folder, records, to_tensor, Tokenizer()):
        batch = collate_fn([data[i] for i in range(3)])
        assert batch.keys() == {"image", "text"}
        assert batch["image"].shape == (3, 3, 4, 4) and batch["image"].dtype == torch.float32
        assert batch["text"].shape == (3, 77) and batch["text"].dtype == torch.int64
        assert torch.equal(batch["image"][2], data[2][0]) and torch.equal(batch["text"][2], data[2][1])


def test_batches_without_captions_hold_pictures_only(folder):
    data = FolderDataset(folder, to_tensor, Tokenizer(), captions=False)
    assert collate_fn([data[0], data[1]]).keys() == {"image"}
    untokenised = FolderDataset(folder, to_tensor)
    assert collate_fn([untokenised[0]])["text"] == ["a black square"]


def test_batches_that_cannot_be_made_say_why(folder):
    image, text = CsvDataset(folder / "pairs.csv", folder, to_tensor, Tokenizer())[0]
    for mixed in ([(image, text), (image, None)], [(image, None), (image, text)]):
        with pytest.raises(BadTable, match="some have none"):
            collate_fn(mixed)
    with pytest.raises(SettingsError, match="transform"):
        collate_fn([FolderDataset(folder)[0]])


def test_loader_workers_give_the_same_batches(folder, records):
    for data in all_kinds(folder, records, to_tensor, Tokenizer()):
        plain, forked = (list(DataLoader(data, 2, collate_fn=collate_fn, num_workers=w)) for w in (0, 2))
        assert len(plain) == len(forked) == 3
        assert all(torch.equal(a[key], b[key]) for a, b in zip(plain, forked, strict=True) for key in a)
        again = pickle.loads(pickle.dumps(data))
        assert all(torch.equal(again[i][0], data[i][0]) for i in range(5))


# --- tables ----------------------------------------------------------------------------------------------------------
def test_tables_of_other_shapes(folder):
    quoted = table(
        folder, ["id,caption,image", '1,"red, ""very"" red",red.png', "", '2,"two\nlines",blue.png'], "a.csv"
    )
    names = {"img_key": "image", "caption_key": "caption"}
    data = CsvDataset(quoted, folder, None, None, sep=None, **names)
    assert [data[i][1] for i in range(2)] == ['red, "very" red', "two\nlines"]
    assert CsvDataset(quoted, folder, None, None, sep=",", **names)[1][0].getpixel((0, 0)) == (0, 0, 255)
    tabbed = table(folder, ["\ufefftitle\tfilepath", f"红色\t{folder / 'red.png'}", "\tblue.png"], "a.tsv")
    data = CsvDataset(tabbed, None, None, None, sep=None)  # absolute path, byte order mark, empty caption
    assert data[0][1] == "红色" and data._captions[1] == ""


def test_missing_columns_are_named_with_those_that_are_there(folder):
    with pytest.raises(BadTable, match=r"no column 'caption' among \['title', 'filepath'\]"):
        CsvDataset(folder / "pairs.csv", folder, None, None, caption_key="caption")
    with pytest.raises(BadTable, match=r"'filepath' or 'title' among \['title\\tfilepath'\]"):
        CsvDataset(folder / "pairs.csv", folder, None, None, sep=",")


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (b"", BadTable, "no column"),
        (b"title\tfilepath\n", EmptyDataset, "no line below"),
        (b"title\tfilepath\na\tb\nalone\n", BadTable, "line 3: 1 cells of 2"),
        ("title\tfilepath\ncaf\xe9\ta.png\n".encode("latin-1"), BadTable, "not UTF-8"),
        ("title\tfilepath\n".encode("utf-16"), BadTable, "not UTF-8"),
        (b'title\tfilepath\n"open\tb\n' + b"x\ty\n" * 50_000, BadTable, "quotation mark"),
    ],
)
def test_unusable_tables_are_refused_by_name(tmp_path, content, error, message):
    (tmp_path / "bad.tsv").write_bytes(content)
    with pytest.raises(error, match=rf"bad\.tsv.*{message}"):
        CsvDataset(tmp_path / "bad.tsv", tmp_path, None, None)


def test_missing_sources_are_named(tmp_path):
    with pytest.raises(BadTable, match="nowhere"):
        CsvDataset(tmp_path / "nowhere.tsv", tmp_path, None, None)
    with pytest.raises(EmptyDataset, match=str(tmp_path)):
        FolderDataset(tmp_path)
    with pytest.raises(SettingsError, match="'skip' or 'raise'"):
        FolderDataset(tmp_path, on_error="ignore")


# --- folders ---------------------------------------------------------------------------------------------------------
def test_folders_are_read_below_and_in_order(folder):
    (folder / "deep" / "er").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(folder / "deep" / "er" / "A.JPG")
    data = FolderDataset(folder, captions=False)
    assert [Path(data._name(i)).name for i in range(6)] == ["black.png", "blue.png", "A.JPG"] + [
        f"{c}.png" for c in ("green", "red", "white")
    ]
    assert data[2][1] is None


def test_a_missing_text_is_a_bad_sample(folder):
    (folder / "blue.txt").unlink()
    with pytest.warns(UserWarning, match=r"blue\.txt"):
        assert FolderDataset(folder)[1][1] == "a green square"
    with pytest.raises(BadImage, match=r"blue\.txt"):
        FolderDataset(folder, on_error="raise")[1]


# --- bad pictures ----------------------------------------------------------------------------------------------------
def test_the_next_good_sample_stands_in_for_a_bad_one_whatever_was_read_before(folder):
    (folder / "green.png").write_bytes(b"no picture")
    (folder / "blue.png").unlink()

    def captions(order: list[int]) -> dict[int, str]:
        data = CsvDataset(folder / "pairs.csv", folder, None, None)
        with pytest.warns(UserWarning) as caught:
            seen = {i: data[i][1] for i in order}
        assert len(data) == 5 and set(data.bad) == {str(folder / "green.png"), str(folder / "blue.png")}
        assert len(caught) == 2 and "not a readable picture" in data.bad[str(folder / "green.png")]
        return seen

    expected = dict(enumerate(["a red square", "a white square", "a white square", "a white square", "a black square"]))
    assert captions([0, 1, 2, 3, 4]) == captions([4, 2, 2, 1, 0, 3, 1]) == expected


def test_the_search_for_a_good_sample_goes_round(folder):
    (folder / "black.png").unlink()  # the last line of the table
    with pytest.warns(UserWarning, match=r"black\.png"):
        assert CsvDataset(folder / "pairs.csv", folder, None, None)[4][1] == "a red square"


def test_bad_pictures_are_fatal_when_asked_for(folder):
    (folder / "red.png").write_bytes(b"")
    with pytest.raises(BadImage, match=r"red\.png"):
        CsvDataset(folder / "pairs.csv", folder, None, None, on_error="raise")[0]


def test_a_set_without_a_good_picture_is_empty(folder):
    for colour in COLOURS:
        (folder / f"{colour}.png").unlink()
    with pytest.warns(UserWarning), pytest.raises(EmptyDataset, match="none of the 5 pictures"):
        CsvDataset(folder / "pairs.csv", folder, None, None)[0]


def test_many_bad_pictures_do_not_flood_the_screen(tmp_path):
    path = table(tmp_path, ["title\tfilepath", *(f"{i}\t{i}.png" for i in range(30))], "a.tsv")
    data = CsvDataset(path, tmp_path, None, None)
    with warnings.catch_warnings(record=True) as caught, pytest.raises(EmptyDataset):
        warnings.simplefilter("always")
        data[0]
    assert len(data.bad) == 30 and len(caught) == 10 and "further ones" in str(caught[-1].message)


def test_errors_of_the_transform_are_not_taken_for_bad_pictures(folder):
    def broken(picture):
        raise OSError("of the transform")

    with pytest.raises(OSError, match="of the transform"):
        CsvDataset(folder / "pairs.csv", folder, broken, None)[0]


# --- records ---------------------------------------------------------------------------------------------------------
def test_records_give_rows_and_chosen_samples(records):
    data = RecordDataset([records, records], caption=lambda row: row["colour"], indices=[7, 0])
    assert len(data) == 2 and [data[i][1] for i in range(2)] == ["blue", "red"]
    assert data.row(0) == {"caption": "a blue square", "colour": "blue"}
    with pytest.raises(EmptyDataset):
        RecordDataset(records, indices=[])


def test_a_damaged_record_is_a_bad_sample(records):
    content = bytearray(records.read_bytes())
    content[12 + 12 * 5 + 8] ^= 1  # in the row of the first
    records.write_bytes(content)
    data = RecordDataset(records)
    with pytest.warns(UserWarning, match=r"pairs\.ffr, sample 0: damaged"):
        assert data[0][1] == "a green square"
    with pytest.raises(BadRecords, match="sample 0"):
        RecordDataset(records, on_error="raise")[0]


def test_captions_are_kept_as_one_buffer(tmp_path):
    """A list of str would be copied into every worker: see `_Texts`."""
    captions = ["", "a", "日本語 😀", "x" * 1000]
    path = table(tmp_path, ["title\tfilepath", *(f"{c}\ta.png" for c in captions)], "a.tsv")
    data = CsvDataset(path, tmp_path, None, None)
    assert [data._captions[i] for i in range(4)] == captions
    assert not any(isinstance(value, list | tuple | dict) for value in vars(data._captions).values())


def test_a_picture_that_the_transform_refuses_is_left_out_like_one_that_cannot_be_read(tmp_path):
    Image.new("RGB", (3000, 2)).save(tmp_path / "a.png")  # far too slender to be cropped
    Image.new("RGB", (40, 30), "red").save(tmp_path / "b.png")
    data = FolderDataset(tmp_path, clip_transform(32))
    with pytest.warns(UserWarning, match="slender"):
        assert torch.equal(data[0][0], data[1][0])
    assert list(data.bad) == [str(tmp_path / "a.png")]
