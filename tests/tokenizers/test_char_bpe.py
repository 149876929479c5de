"""minDALL-E's tokenizer gives what the CharBPETokenizer that it was published with gives."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import pytest
import torch
from tokenizers import CharBPETokenizer

from zoo.errors import CaptionTooLong, DataError, SettingsError
from zoo.tokenizers import CharBpeTokenizer

CAPTIONS = [
    "A red heart, and a red apple.",
    "the cat's café: 3 cats!",
    "a smiling face with (two) eyes",
    "a 红 heart",
] * 3
TEXTS = [
    "A RED heart",
    "a red cat, the apple's eyes!",
    "cats café CAFÉ cafe\u0301",
    "the 红红红 heart",
    "smiling\tface\n with  eyes\u3000a\u00a0\x00b",
    "(two)(eyes).. 3.3",
    "ret hap appple zred",
    "a İ ﬁ",
    "",
    "  ",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """A vocabulary in the published layout: [PAD] and [UNK] among the pieces, ids without a gap."""
    folder = tmp_path_factory.mktemp("char_bpe")
    trained = CharBPETokenizer(unk_token="[UNK]", lowercase=True)
    trained.train_from_iterator(CAPTIONS, 160, special_tokens=["[PAD]", "[UNK]"], show_progress=False)
    trained.save_model(str(folder), "bpe-16k")
    return folder / "bpe-16k-vocab.json", folder / "bpe-16k-merges.txt"


@pytest.fixture(scope="module")
def tokenizer(files) -> CharBpeTokenizer:
    return CharBpeTokenizer(*files)


@pytest.fixture(scope="module")
def published(files) -> CharBPETokenizer:
    """As `dalle/models/tokenizer.py` of minDALL-E builds it."""
    theirs = CharBPETokenizer.from_file(*map(str, files), unk_token="[UNK]", lowercase=True, dropout=None)
    theirs.add_special_tokens(["[PAD]"])
    theirs.enable_padding(length=64, pad_id=theirs.token_to_id("[PAD]"))
    theirs.enable_truncation(max_length=64)
    return theirs


@pytest.mark.parametrize("text", [*TEXTS, "red " * 100])
def test_rows_and_text_are_those_of_the_published_tokenizer(tokenizer, published, text):
    theirs = published.encode(text).ids
    assert tokenizer(text)[0].tolist() == theirs
    assert tokenizer.decode(theirs) == published.decode(theirs)


def test_random_texts_get_the_published_ids(tokenizer, published):
    chance = random.Random(0)
    for _ in range(500):
        text = "a" + "".join(chance.choice("aredhptcsé '.,A🐈红z") for _ in range(40))
        assert tokenizer(text)[0].tolist() == published.encode(text).ids


def test_sizes_are_those_of_the_vocabulary(tokenizer, published):
    assert tokenizer.vocab_size == published.get_vocab_size() and tokenizer.context_length == 64
    assert (tokenizer.pad, tokenizer.unknown) == (0, 1)


def test_a_row_is_ids_and_padding_without_start_or_end(tokenizer):
    ids = tokenizer.encode("a red heart")
    tokens = tokenizer.tokenize_as_tensor(["a red heart", ""], context_length=8)
    assert tokens.dtype == torch.int64 and len(ids) == 3
    assert tokens.tolist() == [ids + [0] * 5, [0] * 8]
    assert tokenizer([]).shape == (0, 64)
    assert tokenizer.decode(tokens[0]) == "a red heart" and tokenizer.decode(tokens[1]) == ""


def test_padding_is_never_of_a_text(tokenizer):
    assert tokenizer.pad not in tokenizer.encode("a [PAD] and [UNK] red")


def test_a_long_text_is_cut_or_refused(tokenizer):
    ids = tokenizer.encode("red heart " * 5)
    assert tokenizer("red heart " * 5, 4)[0].tolist() == ids[:4]
    with pytest.raises(CaptionTooLong, match="has 10 tokens, and .* holds 9"):
        tokenizer("red heart " * 5, 9, "error")
    with pytest.raises(SettingsError):
        tokenizer("red", truncate="start")


def test_another_script_is_refused_and_single_letters_of_it_are_named(files, caplog):
    tokenizer = CharBpeTokenizer(*files)
    for text in ("кот", "猫!", "🐈"):
        with pytest.raises(DataError, match="no letter of"):
            tokenizer(text)
    assert not caplog.records
    tokenizer(["a CAT 猫 Ж🐈", "a red 猫"])
    assert len(caplog.records) == 1 and "know '猫' 'Ж' '🐈':" in caplog.text


@pytest.mark.parametrize("caption", [None, float("nan"), b"cat"])
def test_a_caption_that_is_no_text_is_named(tokenizer, caption):
    with pytest.raises(TypeError, match=type(caption).__name__):
        tokenizer([caption])


def test_a_pickled_tokenizer_gives_the_same_ids(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer))("a red heart").equal(tokenizer("a red heart"))


def test_files_of_another_model_are_refused(files, tmp_path):
    other = tmp_path / "vocab.json"
    other.write_text('{"<unk>": 0, "a": 1}', encoding="utf-8")
    with pytest.raises(DataError, match=r"no \[PAD\] and no \[UNK\]"):
        CharBpeTokenizer(other, files[1])
    with pytest.raises(DataError, match="absent"):
        CharBpeTokenizer(files[0], tmp_path / "absent.txt")
