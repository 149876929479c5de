"""CLIP's tokenizer gives the published ids, whatever the text, and its tensors are what CLIP's text tower expects."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from zoo.errors import CaptionTooLong, DataError, SettingsError
from zoo.tokenizers import ClipTokenizer
from zoo.tokenizers.clip_bpe import PUBLISHED

# What OpenAI's own tokenizer returned for each text, with ftfy 6.3 and regex 2026.
GOLDEN = json.loads((Path(__file__).parent / "clip_bpe_golden.json").read_text())
EMOJI = PUBLISHED.parent / "emoji_bpe.txt.gz"


@pytest.fixture(scope="module")
def tokenizer() -> ClipTokenizer:
    return ClipTokenizer()


def test_the_packaged_vocabulary_is_the_published_file():
    assert hashlib.sha256(PUBLISHED.read_bytes()).hexdigest() == (
        "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
    )


def test_sizes_and_special_tokens_are_those_of_clip(tokenizer):
    assert tokenizer.vocab_size == len(tokenizer.encoder) == len(tokenizer.decoder) == 49408
    assert (tokenizer.start_token, tokenizer.end_token, tokenizer.pad) == (49406, 49407, 0)
    assert tokenizer.all_special_ids == [49406, 49407]
    assert tokenizer.encoder["<|endoftext|>"] == 49407 and tokenizer.decoder[49406] == "<|startoftext|>"


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["name"])
def test_ids_and_text_are_those_of_the_published_tokenizer(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_a_cat(tokenizer):
    tokens = tokenizer.tokenize_as_tensor("cat")
    assert tokens.shape == (1, 77) and tokens.dtype == torch.int64
    assert tokens[0, :3].tolist() == [49406, 2368, 49407]
    assert not tokens[0, 3:].any()
    assert tokenizer("cat").equal(tokens)


def test_a_literal_end_token_hides_what_follows_it_as_published(tokenizer):
    tokens = tokenizer("a cat<|endoftext|>a dog")
    assert tokens.argmax(dim=-1) == 3


def test_a_long_caption_is_cut_and_keeps_its_end(tokenizer):
    tokens = tokenizer.tokenize_as_tensor(["dog " * 200, "cat"])
    assert tokens.shape == (2, 77)
    assert tokens[0, 76] == 49407 and (tokens[0, 1:76] == tokenizer.encode("dog")[0]).all()
    assert tokens[1, :3].tolist() == [49406, 2368, 49407]


def test_a_caption_that_just_fits_is_whole_and_one_word_more_is_too_long(tokenizer):
    assert tokenizer.tokenize_as_tensor("cat " * 75, truncate="error")[0, 76] == 49407
    with pytest.raises(CaptionTooLong, match=r"'cat cat.* has 78 tokens.* holds 77"):
        tokenizer.tokenize_as_tensor("cat " * 76, truncate="error")
    with pytest.raises(CaptionTooLong):
        ClipTokenizer(EMOJI, truncate="error")("cat " * 200)


def test_context_length_is_the_tokenizers_unless_the_call_says_otherwise():
    small = ClipTokenizer(EMOJI, context_length=32)
    assert small(["a", "b"]).shape == (2, 32)
    assert small(["a"], context_length=5).shape == (1, 5)
    assert small(["a"], 77).shape == (1, 77)


def test_no_texts_make_an_empty_tensor(tokenizer):
    assert tokenizer([]).shape == (0, 77)


def test_padding_is_an_argument():
    padded = ClipTokenizer(EMOJI, pad=4095)("a")
    assert (padded[0, 2:] == 4095).all()


@pytest.mark.parametrize("settings", [{"truncate": "start"}, {"context_length": 1}, {"context_length": 0}])
def test_settings_that_cannot_be_are_refused(tokenizer, settings):
    with pytest.raises(SettingsError):
        tokenizer("cat", **settings)


@pytest.mark.parametrize("caption", [None, float("nan"), b"cat"])
def test_a_caption_that_is_no_text_is_named(tokenizer, caption):
    with pytest.raises(TypeError, match=type(caption).__name__):
        tokenizer([caption])


def test_decoding_without_specials_is_the_text_again(tokenizer):
    tokens = tokenizer("a photo of an 猫 !")
    assert tokenizer.decode(tokens[0], skip_special=True) == "a photo of an 猫 !"
    assert tokenizer.decode(tokens[0]).startswith("<|startoftext|>a photo")


def test_every_id_of_the_vocabulary_decodes(tokenizer):
    assert tokenizer.decode(range(tokenizer.vocab_size))


def test_a_trained_vocabulary_is_read_by_the_same_class():
    small = ClipTokenizer(EMOJI)
    assert (small.vocab_size, small.start_token, small.end_token) == (4096, 4094, 4095)
    for text in ("grinning face with smiling eyes", "笑得满地打滚", "naïve 🐈 xyzzy"):
        assert small.decode(small.encode(text), skip_special=True) == text
        assert max(small.encode(text)) < 4094
    assert small("red heart").argmax(dim=-1) == len(small.encode("red heart")) + 1


def test_merges_are_applied_in_the_order_of_the_file(tmp_path):
    plain = tmp_path / "merges.txt"
    plain.write_text("#version: 0.2\nb c</w>\na b\nab c</w>\n")
    small = ClipTokenizer(plain)
    assert small.vocab_size == 256 + 256 + 3 + 2
    assert [small.decoder[id] for id in small.encode("abc")] == ["a", "bc</w>"]
    zipped = tmp_path / "merges.txt.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    assert ClipTokenizer(zipped).encoder == small.encoder


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"i n\nt h\n",
        b"#version: 0.2\na b c\n",
        b"#version: 0.2\n\na b\n",
        b"#version: 0.2\nhello world\n",
        b"#version: 0.2\n\xff\xfe a\n",
        b"\x1f\x8bnot gzip",
        gzip.compress(b"#version: 0.2\na b\n")[:-9],
    ],
    ids=["empty", "no header", "three pieces", "blank line", "unknown pieces", "not text", "not gzip", "truncated"],
)
def test_a_file_that_holds_no_merges_is_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.txt.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="broken"):
        ClipTokenizer(path)


def test_a_merges_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="absent"):
        ClipTokenizer(tmp_path / "absent.txt")


def test_a_pickled_tokenizer_gives_the_same_ids_without_its_file(tmp_path):
    copy = tmp_path / "bpe.txt.gz"
    copy.write_bytes(EMOJI.read_bytes())
    small = ClipTokenizer(copy, context_length=20)
    expected = small(["red heart", "笑脸"])
    copy.unlink()
    assert pickle.loads(pickle.dumps(small))(["red heart", "笑脸"]).equal(expected)


def test_threads_get_the_ids_that_one_thread_gets(tokenizer):
    texts = [case["text"] for case in GOLDEN] * 4
    expected = [case["ids"] for case in GOLDEN] * 4
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(tokenizer.encode, texts)) == expected


def test_a_very_long_word_takes_no_quadratic_time(tokenizer):
    # A naive merge loop needs hours for this one; here it is a fraction of a second.
    assert len(tokenizer.encode("ab" * 100_000)) > 10_000


def test_ids_agree_with_transformers_on_plain_text(tokenizer):
    from transformers import CLIPTokenizer

    from zoo.tokenizers.clip_bpe import read_merges

    theirs = CLIPTokenizer(vocab=tokenizer.encoder, merges=read_merges(PUBLISHED))
    for text in ("A photo of a Dog, running fast!", "it's 3.14 & more", "一只可爱的猫", "été naïve", "snake_case #1"):
        assert [49406, *tokenizer.encode(text), 49407] == theirs(text)["input_ids"]


def test_tokenizing_loads_no_torch_until_a_tensor_is_made():
    code = (
        "import sys, zoo.tokenizers as t; t.ClipTokenizer().encode('a cat'); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
