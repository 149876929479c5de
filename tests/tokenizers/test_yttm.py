"""The reader of YouTokenToMe's files gives that library's ids, and ruDALL-E's rows."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path

import pytest
import torch

from zoo.errors import CaptionTooLong, DataError, SettingsError
from zoo.tokenizers import YttmTokenizer

# A model that youtokentome 1.0.6 trained on a few Russian captions, its pieces, and what it gave for each text.
GOLDEN = json.loads((Path(__file__).parent / "yttm_golden.json").read_text(encoding="utf-8"))
MODEL = GOLDEN["model"]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("yttm") / "bpe.model"
    path.write_text(MODEL, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(file) -> YttmTokenizer:
    return YttmTokenizer(file)


def slow_ids(text: str) -> list[int]:
    """The file's lines read one by one, and a word merged by looking at all of its pairs each time."""
    lines = [list(map(int, line.split())) for line in MODEL.splitlines()]
    letters, merges = lines[0]
    id_of = {chr(letter): id for letter, id in lines[1 : 1 + letters]}
    rules = [tuple(line) for line in lines[1 + letters : 1 + letters + merges]]
    ids = []
    for word in text.lower().split():
        pieces = [id_of["▁"], *(id_of[letter] for letter in word)]
        while found := [rule for rule in rules if rule[:2] in zip(pieces, pieces[1:], strict=False)]:
            left, right, made = found[0]
            at = list(zip(pieces, pieces[1:], strict=False)).index((left, right))
            pieces[at : at + 2] = [made]
        ids += pieces
    return ids


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["text"] or "empty")
def test_ids_and_text_are_those_of_youtokentome(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer.decode(case["ids"]) == case["decoded"]


def test_the_pieces_are_those_of_youtokentome(tokenizer):
    assert tokenizer.vocab_size == len(GOLDEN["pieces"])
    assert [tokenizer.pieces.get(id) for id in range(4, tokenizer.vocab_size)] == GOLDEN["pieces"][4:]
    assert (tokenizer.pad, tokenizer.unknown, tokenizer.start_token, tokenizer.end_token) == (0, 1, 2, 3)


def test_random_words_are_merged_by_the_definition(tokenizer):
    chance = random.Random(0)
    pieces = [piece for piece in GOLDEN["pieces"][4:] if piece != "▁"]
    for _ in range(300):
        text = "".join(chance.choice(pieces) for _ in range(8)).replace("▁", " ")
        assert tokenizer.encode(text) == slow_ids(text)


def test_a_row_is_start_text_end_and_padding(tokenizer):
    tokens = tokenizer.tokenize_as_tensor(["Красный кот", ""])
    ids = tokenizer.encode("красный кот")
    assert tokens.shape == (2, 128) and tokens.dtype == torch.int64
    assert tokens[0].tolist() == [2, *ids, 3] + [0] * (126 - len(ids))
    assert tokens[1].tolist() == [2, 3] + [0] * 126
    assert tokenizer("Красный кот")[0].equal(tokens[0]) and tokenizer([]).shape == (0, 128)
    assert tokenizer.decode(tokens[0]) == "красный кот"


def test_padding_is_never_of_a_text(tokenizer):
    assert all(tokenizer.pad not in tokenizer.encode(text) for text in ("<PAD> red", "кот猫", "▁ кот"))


def test_a_long_text_is_cut_as_published_or_refused(tokenizer):
    ids = tokenizer.encode("кот " * 10)
    assert tokenizer("кот " * 10, 6)[0].tolist() == [2, *ids[:5]], "ru-dalle cuts the end token too"
    assert tokenizer("кот " * 10, len(ids) + 2, "error")[0, -1] == 3
    with pytest.raises(CaptionTooLong, match="has 12 tokens"):
        tokenizer("кот " * 10, 11, "error")
    with pytest.raises(SettingsError):
        tokenizer("кот", truncate="start")


def test_another_script_is_refused_and_single_letters_of_it_are_named(file, caplog):
    tokenizer = YttmTokenizer(file)
    for text in ("猫", "猫, 狗!", "🐈"):
        with pytest.raises(DataError, match="no letter of"):
            tokenizer(text)
    assert not caplog.records
    tokenizer(["кот 猫", "кот 猫"])
    assert len(caplog.records) == 1 and "'猫'" in caplog.text


def test_numbers_of_the_specials_are_those_of_the_file(tmp_path):
    moved = tmp_path / "moved.model"
    last, top = MODEL.rindex("1 0 2 3"), len(GOLDEN["pieces"]) - 1
    # Pad takes the last merge's id and the merge takes pad's.
    head = MODEL[:last].rstrip("\n").rsplit(" ", 1)
    assert head[1] == str(top)
    moved.write_text(f"{head[0]} 0\n1 {top} 2 3\n", encoding="utf-8")
    tokenizer = YttmTokenizer(moved)
    assert tokenizer.pad == top and tokenizer.pieces[0] == GOLDEN["pieces"][top]
    assert tokenizer("кот", 9)[0, -1] == top


@pytest.mark.parametrize("caption", [None, float("nan"), b"cat"])
def test_a_caption_that_is_no_text_is_named(tokenizer, caption):
    with pytest.raises(TypeError, match=type(caption).__name__):
        tokenizer([caption])


def test_a_pickled_tokenizer_gives_the_same_ids(tokenizer):
    assert pickle.loads(pickle.dumps(tokenizer))("красный кот").equal(tokenizer("красный кот"))


def test_a_very_long_word_takes_no_quadratic_time(tokenizer):
    assert len(tokenizer.encode("кот" * 50_000)) > 10_000


LINES = MODEL.splitlines()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "#version: 0.2\na b\n",
        "\n".join(LINES[:-1]),
        "\n".join(LINES[: len(LINES) // 2]),
        "\n".join([*LINES, "7"]),
        "\n".join([*LINES[:-1], "1 0 2 2"]),
        "\n".join([*LINES[:-1], "1 0 -1 -1"]),
        MODEL.replace("9601 ", "9602 "),
        "\n".join([*LINES[:-2], "4 999 " + LINES[-2].split()[-1], LINES[-1]]),
        "-1 0\n",
        "1 0\n99999999999 0\n1 2 3 4\n",
    ],
    ids=[
        "empty", "merges", "no specials", "cut", "a number more", "two specials of one id", "no start or end",
        "no blank", "a merge of nothing", "negative", "no letter",
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, content):
    path = tmp_path / "broken.model"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="broken"):
        YttmTokenizer(path)
