"""A caption is read as DALL-E mini's training read it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from zoo.tokenizers import dalle_mini_text
from zoo.tokenizers.dalle_mini_text import RULES, SPELT, normalise

# What dalle-mini's own TextNormalizer gave, with ftfy 6.3, emoji 2 and unidecode 1.4: a <person> is "a person", and
# hashtags are one word. It always puts a blank before the text, which is the tokenizer's work here.
GOLDEN = json.loads((Path(__file__).parent / "dalle_mini_text_golden.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("text, expected", GOLDEN, ids=[text[:20] or "empty" for text, _ in GOLDEN])
def test_text_is_that_of_the_published_normaliser(text, expected):
    assert normalise(text) == (expected.removeprefix(" "), [])


def differs() -> bool:
    return any(normalise(text) != (expected.removeprefix(" "), []) for text, expected in GOLDEN)


def test_every_rule_is_needed_for_the_golden_texts(monkeypatch):
    for at, rule in enumerate(RULES):
        monkeypatch.setattr(dalle_mini_text, "RULES", RULES[:at] + RULES[at + 1 :])
        assert differs(), rule


def test_every_spelling_is_needed_for_the_golden_texts(monkeypatch):
    for character in SPELT:
        kept = {other: spelt for other, spelt in SPELT.items() if other != character}
        monkeypatch.setattr(dalle_mini_text, "SPELT", kept)
        assert differs(), character


@pytest.mark.parametrize("text, plain, unknown", [
    ("a 猫 sits", "a sits", ["猫"]),
    ("🐈 cat", "cat", ["🐈"]),
    ("Кот, cat", "cat", ["к", "о", "т"]),
    ("猫", "", ["猫"]),
])  # fmt: skip
def test_other_scripts_and_emoji_are_left_out_and_given_back(text, plain, unknown):
    assert normalise(text) == (plain, unknown)


@pytest.mark.parametrize("part", ['"', ",", "<", "#", " ", "'", "a b ", "<person> ", "[1] ", "a.", "%", "http"])
def test_a_very_long_text_takes_no_quadratic_time(part):
    def seconds(n: int) -> float:
        start = time.process_time()
        normalise(part * n)
        return time.process_time() - start

    short, long = (min(seconds(n) for _ in range(2)) for n in (4_000, 32_000))
    assert long < 30 * max(short, 2e-3)  # 8 if linear, 64 if quadratic
