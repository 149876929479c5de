"""DALL-E's tokenizer: every text has ids, padding is none of them, and dropout can be repeated."""

from __future__ import annotations

import gzip
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from zoo.errors import CaptionTooLong, DataError, SettingsError
from zoo.tokenizers import BpeTokenizer, train_bpe
from zoo.tokenizers.bpe import FIRST_IDS
from zoo.tokenizers.clip_bpe import ALPHABET, PUBLISHED
from zoo.tokenizers.merging import merge

EMOJI = PUBLISHED.parent / "emoji_dalle_bpe.json.gz"
TEXTS = [
    "a grinning face with smiling eyes",
    "笑得满地打滚",
    "🐈 a cat, 猫!",
    "naïve xyzzy 3.14",
    "it's a “red” heart&amp;more",
    "⟨pad⟩ <pad> [PAD]",
    "\x00\x07 line\nbreak\ttab",
]
CAPTIONS = ["a red heart", "a red apple", "the red heart and the apple", "红心", "红苹果"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> BpeTokenizer:
    return BpeTokenizer(EMOJI)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(train_bpe(CAPTIONS, 300), encoding="utf-8")
    return path


def in_bytes(ids, tokenizer: BpeTokenizer) -> bytes:
    """The bytes that ids spell, by the table of letters alone."""
    pieces = {id: piece for piece, id in tokenizer.tokenizer.get_vocab().items()}
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters = {b: chr(b) for b in prints}
    letters |= {b: chr(256 + at) for at, b in enumerate(sorted(set(range(256)) - prints))}
    byte_of = {letter: byte for byte, letter in letters.items()}
    return bytes(byte_of[letter] for id in ids for letter in pieces[id])


# --- ids and text ---
@pytest.mark.parametrize("text", ["a grinning face", "笑得满地打滚", "🐈 猫 and a dog", "naïve xyzzy", "(⟨pad⟩) [pad]"])
@pytest.mark.parametrize("dropout", [0.0, 0.3, 1.0])
def test_text_comes_back(text, dropout):
    tokenizer = BpeTokenizer(EMOJI, dropout=dropout)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.tokenize_as_tensor(text)[0]) == text


def test_text_is_cleaned_and_lower_cased(tokenizer):
    assert tokenizer.decode(tokenizer.encode("  A   Red\nHEART &amp; caf\u00c3\u00a9 ")) == "a red heart & café"


def test_ids_spell_the_text_with_a_blank_before_it(tokenizer):
    for text in ("a red heart", "笑脸", "🐈"):
        assert in_bytes(tokenizer.encode(text), tokenizer) == f" {text}".encode()


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("dropout", [0.0, 0.1, 1.0])
def test_padding_is_never_of_a_text(text, dropout):
    tokenizer = BpeTokenizer(EMOJI, dropout=dropout)
    ids = tokenizer.encode(text)
    assert ids and tokenizer.pad not in ids and max(ids) < tokenizer.vocab_size


@pytest.mark.parametrize("text", ["", "  \n", "\u3000"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_text_without_letters_is_padding_alone(text, dropout):
    tokenizer = BpeTokenizer(EMOJI, dropout=dropout)
    assert tokenizer.encode(text) == []
    tokens = tokenizer(text)
    assert tokens.shape == (1, 256) and (tokens == tokenizer.pad).all()
    assert tokenizer.decode(tokens[0]) == ""


def test_tensors_hold_the_ids_and_then_padding(tokenizer):
    tokens = tokenizer.tokenize_as_tensor(["a red heart", "笑脸"], context_length=9)
    assert tokens.shape == (2, 9) and tokens.dtype == torch.int64
    for row, text in zip(tokens.tolist(), ("a red heart", "笑脸"), strict=True):
        ids = tokenizer.encode(text)
        assert row == ids + [0] * (9 - len(ids))
    assert tokenizer([]).shape == (0, 256)
    assert BpeTokenizer(EMOJI, 20)("a").shape == (1, 20)


def test_a_long_text_is_cut_or_refused(tokenizer):
    ids = tokenizer.encode("red " * 30)
    assert tokenizer("red " * 30, 8)[0].tolist() == ids[:8]
    assert tokenizer("red " * 30, len(ids), "error")[0].tolist() == ids
    with pytest.raises(CaptionTooLong, match=rf"'red red.* has {len(ids)} tokens, and .* holds {len(ids) - 1}"):
        tokenizer("red " * 30, len(ids) - 1, truncate="error")
    with pytest.raises(CaptionTooLong):
        BpeTokenizer(EMOJI, 8, truncate="error")("red " * 30)


@pytest.mark.parametrize("settings", [{"truncate": "start"}, {"context_length": 0}])
def test_settings_of_a_call_that_cannot_be_are_refused(tokenizer, settings):
    with pytest.raises(SettingsError):
        tokenizer("cat", **settings)


@pytest.mark.parametrize("dropout", [-0.1, 1.1, float("nan")])
def test_a_dropout_that_is_no_probability_is_refused(dropout):
    with pytest.raises(SettingsError, match="dropout"):
        BpeTokenizer(EMOJI, dropout=dropout)


@pytest.mark.parametrize("caption", [None, float("nan"), b"cat"])
def test_a_caption_that_is_no_text_is_named(tokenizer, caption):
    with pytest.raises(TypeError, match=type(caption).__name__):
        tokenizer([caption])


# --- dropout ---
def merged(text: str, tokenizer: BpeTokenizer) -> list[int]:
    """Clean text -> ids by `merge` from letters, each word alone."""
    words = tokenizer.tokenizer.pre_tokenizer.pre_tokenize_str(text)
    letters = {letter: id for id, letter in enumerate(ALPHABET, start=1)}
    return [id for word, _ in words for id in merge([letters[letter] for letter in word], tokenizer._rules)]


@pytest.mark.parametrize("text", ["a grinning face with smiling eyes", "笑得满地打滚", "🐈 猫, naïve xyzzy 3.14!!"])
def test_without_dropout_the_library_the_file_and_our_merging_agree(tokenizer, text):
    library = Tokenizer.from_str(gzip.decompress(EMOJI.read_bytes()).decode())
    barely = BpeTokenizer(EMOJI, dropout=1e-300)  # the path of dropout, none of which falls
    assert tokenizer.encode(text) == library.encode(text).ids == merged(text, tokenizer) == barely.encode(text)


def test_all_captions_get_the_same_ids_by_both_ways(tokenizer):
    from zoo.data import open_dataset

    samples = open_dataset("emoji", split="test", language=None)
    captions = {samples.row(at)[name] for at in range(len(samples)) for name in ("caption_en", "caption_zh")}
    barely = BpeTokenizer(EMOJI, dropout=1e-300)
    assert len(captions) > 500
    for caption in captions:
        assert tokenizer.encode(caption) == barely.encode(caption)


def test_dropping_every_merge_leaves_the_bytes():
    tokenizer = BpeTokenizer(EMOJI, dropout=1)
    for text in ("a red heart", "笑脸"):
        assert len(tokenizer.encode(text)) == len(f" {text}".encode())
        assert max(tokenizer.encode(text)) <= 256


def test_dropout_is_that_of_torchs_seed():
    tokenizer, texts = BpeTokenizer(EMOJI, dropout=0.5), ["a grinning face with smiling eyes", "笑得满地打滚"] * 8
    torch.manual_seed(3)
    first, second = tokenizer(texts), tokenizer(texts)
    state = torch.get_rng_state()
    third = tokenizer(texts)
    torch.manual_seed(3)
    assert tokenizer(texts).equal(first) and tokenizer(texts).equal(second) and not first.equal(second)
    torch.set_rng_state(state)
    assert tokenizer(texts).equal(third)


def test_one_merge_in_ten_is_dropped(file):
    tokenizer = BpeTokenizer(file, dropout=0.1)
    # " a" is one merge away from its two bytes, and no other merge is possible in it.
    assert len(BpeTokenizer(file).encode("a")) == 1
    torch.manual_seed(0)
    dropped = sum(len(tokenizer.encode("a")) == 2 for _ in range(10_000)) / 10_000
    assert dropped == pytest.approx(0.1, abs=0.012)  # four standard deviations


def test_a_pickled_tokenizer_gives_the_same_ids_without_its_file(file, tmp_path):
    copy = tmp_path / "tokenizer.json"
    copy.write_bytes(file.read_bytes())
    tokenizer = BpeTokenizer(copy, context_length=20, dropout=0.5)
    torch.manual_seed(0)
    expected = tokenizer(["a red heart", "红心"])
    copy.unlink()
    torch.manual_seed(0)
    assert pickle.loads(pickle.dumps(tokenizer))(["a red heart", "红心"]).equal(expected)


# --- vocabularies ---
def test_a_vocabulary_has_at_most_the_size_asked_for():
    small, full = (json.loads(train_bpe(CAPTIONS, size))["model"] for size in (270, 4096))
    assert len(small["vocab"]) == 270 and len(small["merges"]) == 270 - 257
    assert 270 < len(full["vocab"]) < 400, "five captions have few pairs"
    assert full["merges"][:13] == small["merges"]
    for model in (small, full):
        assert sorted(model["vocab"], key=model["vocab"].get)[:257] == FIRST_IDS


def test_the_same_captions_give_the_same_text_in_any_process():
    code = f"from zoo.tokenizers import train_bpe; print(train_bpe({CAPTIONS!r}, 320))"
    environment = {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "2"}
    made = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert made.stdout.removesuffix("\n") == train_bpe(CAPTIONS, 320) == train_bpe(iter(CAPTIONS), 320)


def test_captions_are_cleaned_as_texts_are():
    assert train_bpe([f" {caption.upper()}\n" for caption in CAPTIONS], 320) == train_bpe(CAPTIONS, 320)


def test_frequent_words_become_one_piece(file):
    tokenizer = BpeTokenizer(file)
    assert len(tokenizer.encode("Red heart")) == 2
    assert len(tokenizer.encode("红心")) < len("红心".encode())


def test_merges_never_cross_words(file):
    pieces = json.loads(file.read_text(encoding="utf-8"))["model"]["vocab"]
    assert not [piece for piece in pieces if "Ġ" in piece[1:]]


@pytest.mark.parametrize("size", [0, 257])
def test_a_size_without_room_for_a_merge_is_refused(size):
    with pytest.raises(SettingsError, match="257"):
        train_bpe(CAPTIONS, size)


def test_a_vocabulary_is_read_plain_and_gzipped(file, tmp_path):
    zipped = tmp_path / "bpe.json.gz"
    zipped.write_bytes(gzip.compress(file.read_bytes()))
    assert BpeTokenizer(zipped)(TEXTS).equal(BpeTokenizer(file)(TEXTS))


def broken(**changes) -> bytes:
    """A vocabulary by `train_bpe`, with parts of its model replaced."""
    made = json.loads(train_bpe(CAPTIONS, 270))
    made["model"] |= {name: change(made["model"][name]) for name, change in changes.items()}
    return json.dumps(made).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}',
        b'{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}',
        b'{"version": "1.0"',
        b"\xff\xfe",
        gzip.compress(broken())[:-9],
        broken(merges=lambda merges: [*merges, ["a", "unheard"]]),
        broken(merges=lambda merges: [*merges, ["a"]]),
        broken(vocab=lambda vocab: vocab | {"more": 300}),
        broken(vocab=lambda vocab: {piece: id for piece, id in vocab.items() if piece != "a"}),
        broken(vocab=lambda vocab: vocab | {"a": vocab["b"], "b": vocab["a"]}),
    ],
    ids=[
        "empty", "no model", "a list", "too few ids", "unigram", "cut", "not text", "cut gzip", "a merge of nothing",
        "a merge of one", "a gap in the ids", "a byte missing", "bytes in another order",
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match="broken"):
        BpeTokenizer(path)


def test_a_vocabulary_of_clip_and_one_that_is_not_there_are_refused(tmp_path):
    with pytest.raises(DataError, match="bpe_simple"):
        BpeTokenizer(PUBLISHED)
    with pytest.raises(DataError, match="absent"):
        BpeTokenizer(tmp_path / "absent.json")


# --- the packaged one ---
def test_the_packaged_vocabulary_suits_the_emoji_captions(tokenizer):
    from zoo.data import open_dataset

    assert tokenizer.vocab_size == 2048
    samples = open_dataset("emoji", split="test", language=None)
    rows = list(map(samples.row, range(len(samples))))
    lengths = sorted(len(tokenizer.encode(row[name])) for row in rows for name in ("caption_en", "caption_zh"))
    assert lengths[len(lengths) * 99 // 100] <= 16, "a context of 32 holds nearly every caption that was not trained on"
    assert lengths[-1] <= 32


def test_tokenizing_loads_no_torch_until_a_tensor_is_made():
    code = (
        f"import sys, zoo.tokenizers as t; t.BpeTokenizer({str(EMOJI)!r}).encode('a cat'); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
