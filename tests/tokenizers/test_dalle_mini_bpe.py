"""DALL-E mini's tokenizer gives what BART's of transformers gives for the text that training would have seen."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer

from zoo.errors import CaptionTooLong, DataError, SettingsError
from zoo.tokenizers import DalleMiniTokenizer
from zoo.tokenizers.dalle_mini_text import normalise

CAPTIONS = [" a red heart, and a red apple", " the cat's 3.14 cats", " it's an armchair, an avocado"] * 3
TEXTS = ["A red heart!", "it's a cat's   apple", "1,000 “cats” & 3.14 hearts (two)", "we'll 'tis don't", "café@home"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("dalle_mini")
    trained = ByteLevelBPETokenizer()
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(CAPTIONS, 330, special_tokens=specials, show_progress=False)
    trained.save_model(str(folder))
    return folder / "vocab.json", folder / "merges.txt"


@pytest.fixture(scope="module")
def tokenizer(files) -> DalleMiniTokenizer:
    return DalleMiniTokenizer(*files)


@pytest.mark.parametrize("text", [*TEXTS, "red " * 100])
def test_rows_are_those_of_barts_tokenizer(tokenizer, files, text):
    from transformers import BartTokenizer

    theirs = BartTokenizer.from_pretrained(str(files[0].parent))
    plain = " " + normalise(text)[0]
    row = theirs(plain, padding="max_length", truncation=True, max_length=64)["input_ids"]
    assert tokenizer(text)[0].tolist() == row
    assert " " + tokenizer.decode(row) == theirs.decode(row, skip_special_tokens=True)


def test_a_row_is_start_text_end_and_padding(tokenizer):
    ids = tokenizer.encode("a red heart")
    tokens = tokenizer.tokenize_as_tensor(["A red heart", "", "..."], context_length=8)
    assert tokens.dtype == torch.int64 and len(ids) == 3
    assert tokens[0].tolist() == [0, *ids, 2, 1, 1, 1]
    assert tokens[1].tolist() == tokens[2].tolist() == [0, 2, 1, 1, 1, 1, 1, 1], "the caption of super conditioning"
    assert tokenizer([]).shape == (0, 64)
    assert tokenizer.decode(tokens[0]) == "a red heart"
    assert (tokenizer.start_token, tokenizer.pad, tokenizer.end_token) == (0, 1, 2)


def test_specials_are_never_of_a_text(tokenizer):
    assert not set(tokenizer.all_special_ids) & set(tokenizer.encode("a <pad> < pad> <s> red &lt;/s&gt; <unk> x"))


def test_the_size_is_that_of_the_largest_id(files, tokenizer, tmp_path):
    pieces = json.loads(files[0].read_text(encoding="utf-8"))
    assert tokenizer.vocab_size == len(pieces)
    sparse = tmp_path / "vocab.json"
    sparse.write_text(json.dumps(pieces | {"<mask>": 500}), encoding="utf-8")
    assert DalleMiniTokenizer(sparse, files[1]).vocab_size == 501


def test_a_long_text_is_cut_and_keeps_its_end_or_is_refused(tokenizer):
    ids = tokenizer.encode("red heart " * 5)
    assert tokenizer("red heart " * 5, 6)[0].tolist() == [0, *ids[:4], 2]
    with pytest.raises(CaptionTooLong, match="has 12 tokens with start and end, and .* holds 11"):
        tokenizer("red heart " * 5, 11, "error")
    with pytest.raises(SettingsError):
        tokenizer("red", truncate="start")


def test_another_script_is_refused_and_what_is_left_out_is_named(files, caplog):
    tokenizer = DalleMiniTokenizer(*files)
    for text in ("кот", "猫!", "🐈"):
        with pytest.raises(DataError, match="no letter of"):
            tokenizer(text)
    assert not caplog.records
    assert tokenizer("a red 猫").equal(tokenizer("a red")) and tokenizer("猫 a") is not None
    assert len(caplog.records) == 1 and "'猫'" in caplog.text


@pytest.mark.parametrize("caption", [None, float("nan"), b"cat"])
def test_a_caption_that_is_no_text_is_named(tokenizer, caption):
    with pytest.raises(TypeError, match=type(caption).__name__):
        tokenizer([caption])


def test_a_pickled_tokenizer_gives_the_same_ids(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer))("a red heart").equal(tokenizer("a red heart"))


def test_files_of_another_model_are_refused(files, tmp_path):
    other = tmp_path / "vocab.json"
    other.write_text('{"[PAD]": 0, "<s>": 1, "</s>": 2}', encoding="utf-8")
    with pytest.raises(DataError, match="no <pad> and no <unk>"):
        DalleMiniTokenizer(other, files[1])
