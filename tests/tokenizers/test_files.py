"""Vocabularies on disk: plain and gzipped are alike, and what is something else is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from zoo.errors import DataError
from zoo.tokenizers.files import read_json, read_text, read_vocabulary

PIECES = {"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3, "c</w>": 4, "ab": 5, "abc</w>": 6}
MERGES = "#version: 0.2\na b\nab c</w>\n"


def write(folder: Path, vocabulary=PIECES, merges=MERGES) -> tuple[Path, Path]:
    paths = folder / "vocab.json", folder / "merges.txt"
    paths[0].write_text(json.dumps(vocabulary), encoding="utf-8")
    paths[1].write_text(merges, encoding="utf-8", newline="")
    return paths


def test_text_and_json_are_read_plain_and_gzipped(tmp_path):
    for name, data in (("plain", '{"猫": 1}'.encode()), ("zipped", gzip.compress('{"猫": 1}'.encode()))):
        (tmp_path / name).write_bytes(data)
        assert read_text(tmp_path / name, "a thing") == '{"猫": 1}' and read_json(tmp_path / name, "a thing") == {
            "猫": 1
        }


@pytest.mark.parametrize("data", [b"{", b"\xff", gzip.compress(b"{}")[:-9]], ids=["cut", "not text", "cut gzip"])
def test_what_cannot_be_read_says_which_file_and_as_what(tmp_path, data):
    (tmp_path / "thing").write_bytes(data)
    with pytest.raises(DataError, match="thing cannot be read as a vocabulary"):
        read_json(tmp_path / "thing", "a vocabulary")
    with pytest.raises(DataError, match="absent cannot be read as a vocabulary"):
        read_text(tmp_path / "absent", "a vocabulary")


@pytest.mark.parametrize("merges", [MERGES, MERGES.replace("\n", "\r\n"), MERGES.partition("\n")[2]])
def test_a_vocabulary_is_its_pieces_and_merges_in_order(tmp_path, merges):
    pieces, pairs = read_vocabulary(*write(tmp_path, merges=merges), needs=["[PAD]"])
    assert pieces == PIECES and pairs == [("a", "b"), ("ab", "c</w>")]


def test_a_vocabulary_without_merges_is_one(tmp_path):
    assert read_vocabulary(*write(tmp_path, merges="#version: 0.2\n"), needs=[])[1] == []


@pytest.mark.parametrize(
    "vocabulary, merges, needs, message",
    [
        (list(PIECES), MERGES, [], "vocab.json is not a vocab.json"),
        (PIECES | {"d": "7"}, MERGES, [], "vocab.json is not a vocab.json"),
        (PIECES | {"d": -1}, MERGES, [], "vocab.json is not a vocab.json"),
        (PIECES | {"d": 6}, MERGES, [], "vocab.json is damaged"),
        (PIECES, MERGES, ["<s>", "[PAD]", "</s>"], "no <s> and no </s>"),
        (PIECES, MERGES + "b a\n", [], "merges.txt does not belong .* line 4 joins 'b' and 'a'"),
        (PIECES, MERGES + "\n", [], "merges.txt does not belong .* line 4"),
        (PIECES, MERGES + "a b c\n", [], "merges.txt does not belong .* line 4"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, vocabulary, merges, needs, message):
    with pytest.raises(DataError, match=message):
        read_vocabulary(*write(tmp_path, vocabulary, merges), needs=needs)
