"""Tokens of textual inversion: ids of their own where they stand, and nothing else changes."""

from __future__ import annotations

import pickle

import pytest

from zoo.errors import SettingsError
from zoo.tokenizers import ClipTokenizer
from zoo.tokenizers.concepts import ConceptTokenizer

BASE = ClipTokenizer(context_length=12, pad=49407)


def make(**tokens: list[int]) -> ConceptTokenizer:
    tokenizer = ConceptTokenizer(BASE)
    for token, ids in tokens.items():
        tokenizer.add(token, ids)
    return tokenizer


def toy() -> ConceptTokenizer:
    return make(**{"<cat-toy>": [50000, 50001], "easynegative": [50002]})


@pytest.mark.parametrize("text", ["", "a photo of a cat", "two  words, and &amp; more", "uneasynegative"])
def test_other_texts_are_what_they_were(text: str):
    assert toy().encode(text) == BASE.encode(text)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("a <cat-toy>, red", ["a", [50000, 50001], ", red"]),
        ("<CAT-Toy>", [[50000, 50001]]),
        ("<cat-toy><cat-toy> ", [[50000, 50001], [50000, 50001]]),
        ("EasyNegative, blurry", [[50002], ", blurry"]),
        ("my<cat-toy>s", ["my", [50000, 50001], "s"]),
        ("easynegatives", ["easynegatives"]),
        ("easy negative", ["easy negative"]),
    ],
)
def test_its_ids_are_where_a_token_stands(text: str, pieces: list):
    assert toy().encode(text) == [id for p in pieces for id in (BASE.encode(p) if isinstance(p, str) else p)]


def test_the_longest_token_is_found():
    tokenizer = make(**{"<a>": [7], "<a>+": [8]})
    assert tokenizer.encode("<a>+ <a>") == [8, 7]


def test_rows_are_filled_as_the_base_fills_them():
    rows = toy().tokenize_as_tensor(["a <cat-toy>", "<cat-toy> " * 9], context_length=8)
    start, end = BASE.start_token, BASE.end_token
    assert rows[0].tolist() == [start, *BASE.encode("a"), 50000, 50001, end, 49407, 49407, 49407]
    assert rows[1].tolist() == [start, *[50000, 50001] * 3, end]
    assert toy()("a cat").equal(BASE("a cat"))


def test_ids_are_told_as_the_token():
    assert toy().decode(toy().encode("a <cat-toy> and <cat-toy> <cat-toy>, easynegative")) == (
        "a <cat-toy> and <cat-toy> <cat-toy> , easynegative"
    )


def test_it_travels_to_workers():
    tokenizer = pickle.loads(pickle.dumps(toy()))
    assert tokenizer.encode("a <cat-toy>") == toy().encode("a <cat-toy>")


@pytest.mark.parametrize("token", ["<cat-toy>", "<Cat-Toy>", "cat", "EasyNegative "])
def test_a_token_that_there_is_cannot_be_added(token: str):
    tokenizer = toy()
    with pytest.raises(SettingsError, match="already"):
        tokenizer.add(token, [50003])
    assert tokenizer.encode("<cat-toy> cat") == [50000, 50001, *BASE.encode("cat")]


def test_a_token_has_a_letter():
    with pytest.raises(SettingsError, match="needs a token"):
        make(**{" ": [50000]})
