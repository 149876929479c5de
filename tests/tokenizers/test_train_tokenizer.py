"""The script that trains a vocabulary writes what ClipTokenizer reads, the same bytes each time."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from zoo.tokenizers import ClipTokenizer
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


def test_the_same_captions_give_the_same_bytes(script, captions, tmp_path, monkeypatch):
    files = [tmp_path / "one.txt.gz", tmp_path / "two.txt.gz"]
    for file in files:
        run(script, monkeypatch, captions, "--vocab-size", 600, "--out", file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes()[4:8] == bytes(4), "the gzip header names no time"


def test_the_packaged_emoji_vocabulary_is_what_the_script_makes(script, tmp_path, monkeypatch):
    out = tmp_path / "emoji_bpe.txt.gz"
    run(script, monkeypatch, "--vocab-size", 4096, "--out", out)
    packaged = PUBLISHED.parent / "emoji_bpe.txt.gz"
    assert ClipTokenizer(out).encoder == ClipTokenizer(packaged).encoder


def test_a_size_without_room_for_a_merge_is_refused(script, captions, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(script, monkeypatch, captions, "--vocab-size", 514)
    assert "514" in capsys.readouterr().err
