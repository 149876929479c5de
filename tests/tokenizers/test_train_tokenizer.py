"""The script that trains a vocabulary writes what ClipTokenizer or BpeTokenizer reads, the same bytes each time."""

from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path

import pytest

from zoo.tokenizers import BpeTokenizer, ClipTokenizer
from zoo.tokenizers.clip_bpe import PUBLISHED

SCRIPT = Path(__file__).parents[2] / "examples" / "train_tokenizer.py"
CAPTIONS = [
    "a grinning face, face, smile",
    "a red heart, love",
    "笑脸，高兴",
    "红心，爱情",
    "It&#39;s A SMILING FACE!",
] * 3


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_tokenizer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def captions(tmp_path) -> Path:
    path = tmp_path / "captions.txt"
    path.write_text("\n".join(CAPTIONS), encoding="utf-8")
    return path


def run(script, monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *map(str, arguments)])
    return script.main()


def test_the_vocabulary_has_the_size_asked_for_and_merges_frequent_words(script, captions, tmp_path, monkeypatch):
    out = tmp_path / "bpe.txt.gz"
    assert run(script, monkeypatch, captions, "--vocab-size", 540, "--out", out) == 0
    tokenizer = ClipTokenizer(out)
    assert tokenizer.vocab_size == 540
    assert tokenizer.end_token == 539
    assert len(tokenizer.encode("Face")) == 1, "the words are CLIP's: cleaned, lower case, with their ending"
    for text in ("a grinning face", "笑脸 高兴", "unseen words 猫"):
        assert tokenizer.decode(tokenizer.encode(text), skip_special=True) == text


def test_dalles_vocabulary_has_the_size_asked_for_and_its_lengths_are_said(
    script, captions, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run(script, monkeypatch, captions, "--kind", "dalle", "--vocab-size", 300) == 0
    tokenizer = BpeTokenizer("bpe.json.gz")
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode("Face")) == 1
    longest = max(len(tokenizer.encode(text)) for text in CAPTIONS)
    assert f"300 ids. Of {len(CAPTIONS)} captions" in (said := capsys.readouterr().out)
    assert said.endswith(f"the longest {longest}\n")


@pytest.mark.parametrize("kind", ["clip", "dalle"])
def test_the_same_captions_give_the_same_bytes(script, captions, tmp_path, monkeypatch, kind):
    files = [tmp_path / "one.txt.gz", tmp_path / "two.txt.gz"]
    for file in files:
        run(script, monkeypatch, captions, "--kind", kind, "--vocab-size", 600, "--out", file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes()[4:8] == bytes(4), "the gzip header names no time"


def test_the_packaged_emoji_vocabulary_is_what_the_script_makes(script, tmp_path, monkeypatch):
    out = tmp_path / "emoji_bpe.txt.gz"
    run(script, monkeypatch, "--vocab-size", 4096, "--out", out)
    packaged = PUBLISHED.parent / "emoji_bpe.txt.gz"
    assert ClipTokenizer(out).encoder == ClipTokenizer(packaged).encoder


def test_the_packaged_vocabulary_of_dalle_is_what_the_script_makes_of_the_captions(script, tmp_path, monkeypatch):
    out = tmp_path / "bpe.json.gz"
    run(script, monkeypatch, "--kind", "dalle", "--vocab-size", 2048, "--out", out)
    packaged = PUBLISHED.parent / "emoji_dalle_bpe.json.gz"
    # Texts, since another zlib may compress to other bytes.
    assert gzip.decompress(out.read_bytes()) == gzip.decompress(packaged.read_bytes())


@pytest.mark.parametrize("kind, size", [("clip", 514), ("dalle", 257)])
def test_a_size_without_room_for_a_merge_is_refused(script, captions, monkeypatch, capsys, kind, size):
    with pytest.raises(SystemExit):
        run(script, monkeypatch, captions, "--kind", kind, "--vocab-size", size)
    assert str(size) in capsys.readouterr().err
