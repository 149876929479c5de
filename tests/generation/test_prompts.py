"""Prompts: the web UI's syntax of weights, its way of cutting long ones, and what a weight does to a context."""

from __future__ import annotations

import random

import pytest
import torch

from zoo.errors import SettingsError
from zoo.generation.prompts import weigh, weighted, windows


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a cat", [("a cat", 1)]),
        ("", []),
        ("  ", []),
        ("a (cat) on", [("a ", 1), ("cat", 1.1), (" on", 1)]),
        ("a [cat]", [("a ", 1), ("cat", 1 / 1.1)]),
        ("(cat:1.3)", [("cat", 1.3)]),
        ("(cat: .5 )", [("cat", 0.5)]),
        ("(cat:-1.)", [("cat", -1)]),
        ("((cat))", [("cat", 1.21)]),
        ("([cat])", [("cat", 1)]),
        ("(a (b:2) c:1.5) d", [("a ", 1.5), ("b", 3), (" c", 1.5), (" d", 1)]),
        ("(16:9 tv:1.2)", [("16:9 tv", 1.2)]),
        ("a:b", [("a:b", 1)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("[a:1.3]", [("a:1.3", 1 / 1.1)]),
        (r"\(a\) \[b\] \\", [(r"(a) [b] " + "\\", 1)]),
        (r"a\b", [(r"a\b", 1)]),
        (r"(a\):1.2)", [("a)", 1.2)]),
        ("(a", [("(a", 1)]),
        ("a)", [("a)", 1)]),
        ("a:1.2)", [("a:1.2)", 1)]),
        ("[a:1.2)", [("[a:1.2)", 1)]),
        ("((a)", [("(", 1), ("a", 1.1)]),
        ("(a [b) c]", [("a [b", 1.1), (" c]", 1)]),
        (":) (cat)", [(":) ", 1), ("cat", 1.1)]),
        ("(:1.3)a()", [("a", 1)]),
        ("(a)(b) (c:1.1)", [("ab", 1.1), (" ", 1), ("c", 1.1)]),
    ],
)
def test_brackets_weigh_what_is_inside(prompt: str, parts: list[tuple[str, float]]):
    found = weighted(prompt)
    assert [text for text, _ in found] == [text for text, _ in parts if text.strip()]
    assert [weight for _, weight in found] == pytest.approx([weight for text, weight in parts if text.strip()])


def test_an_escaped_text_is_itself():
    draw = random.Random(0)
    for _ in range(300):
        text = "".join(draw.choices("ab:.1 ()[]\\\n", k=12)) + "z"
        escaped = "".join("\\" * (letter in "()[]\\") + letter for letter in text)
        assert weighted(escaped) == [(text, 1.0)]


def test_no_letter_of_an_unfinished_prompt_is_lost():
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(draw.choices("ab:1 (", k=12)) + "z"  # nothing closes
        assert weighted(text) == [(text, 1.0)]


def spelt(text: str) -> list[int]:
    return list(map(ord, text))


def web_ui(ids: list[tuple[int, float]], room: int, comma: int) -> list[list[tuple[int, float]]]:
    """Its loop over ids, told again: a window that is full goes on from its last comma if that is near."""
    done, window, last = [], [], -1
    for id, weight in ids:
        if id == comma:
            last = len(window)
        elif len(window) == room and last != -1 and len(window) - last <= 20:
            done.append(window[: last + 1])
            window, last = window[last + 1 :], -1
        if len(window) == room:
            done.append(window)
            window, last = [], -1
        window = [*window, (id, weight)]
    return done + [window] if window else done


def test_windows_are_cut_as_the_web_ui_cuts():
    draw = random.Random(2)
    for _ in range(200):
        room = draw.choice([21, 22, 40, 75])  # below, its loop forgets a comma that begins a window
        commas = draw.choice([0.0, 0.02, 0.1, 0.5])
        words = "".join("," if draw.random() < commas else "x" for _ in range(draw.randrange(200)))
        place = draw.randrange(len(words) + 1)
        parts = [(words[:place], 1.0), (words[place:], 1.3)]
        ids = [(id, weight) for text, weight in parts for id in spelt(text)]
        assert windows(parts, spelt, room) == web_ui(ids, room, ord(","))


def test_a_phrase_is_not_torn_apart_and_nothing_is_lost():
    cut = windows([("aaaa,bbb", 1.0), ("bb,cc", 2.0)], spelt, 8)
    assert ["".join(chr(id) for id, _ in window) for window in cut] == ["aaaa,", "bbbbb,cc"]
    assert [weight for _, weight in cut[1]] == [1.0] * 3 + [2.0] * 5
    for room in range(1, 25):
        small = windows([("ab,c,,defgh,i" * 3, 1.0)], spelt, room)
        assert "".join(chr(id) for window in small for id, _ in window) == "ab,c,,defgh,i" * 3
        assert all(1 <= len(window) <= room for window in small)
    assert len(windows([("aaaaa," + "b" * 40, 1.0)], spelt, 25)[0]) == 6  # the first of the last 20
    far = windows([("a," + "b" * 40, 1.0)], spelt, 30)  # the comma is not among the last 20
    assert [len(window) for window in far] == [30, 12]


def test_no_text_has_no_window():
    assert windows([], spelt, 75) == []


def test_a_comma_is_known_where_it_begins_with_a_sign_of_its_own():
    def pieces(text: str) -> list[int]:
        """As sentencepiece: 1 stands for a word's start, so that a comma alone is two pieces."""
        return [1, *map(ord, text)]

    assert [len(window) for window in windows([("aaa,bbbbbb", 1.0)], pieces, 8)] == [5, 6]


def test_a_window_needs_room():
    with pytest.raises(SettingsError, match="room for 0"):
        windows([("a", 1.0)], spelt, 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_one_leave_every_bit(dtype: torch.dtype):
    draw = torch.Generator().manual_seed(0)
    context = torch.randn(3, 7, 6, generator=draw, dtype=torch.float64).to(dtype)
    weights = torch.ones(3, 7)
    assert weigh(context, weights).equal(context) and weigh(context, weights).dtype == dtype
    weights[1, 2] = 1.5
    assert weigh(context, weights)[[0, 2]].equal(context[[0, 2]])  # windows beside it neither
    assert weigh(torch.zeros(1, 7, 6), weights[1:2]).equal(torch.zeros(1, 7, 6))


def test_a_weight_multiplies_its_token_and_the_mean_stays():
    draw = torch.Generator().manual_seed(1)
    context, weights = torch.randn(4, 7, 6, generator=draw) + 0.5, torch.rand(4, 7, generator=draw) * 2
    found = weigh(context, weights)
    for window, weight, got in zip(context.double(), weights.double(), found, strict=True):
        by_hand = torch.stack([vector * w for vector, w in zip(window, weight, strict=True)])
        by_hand *= window.mean() / by_hand.mean()
        torch.testing.assert_close(got.double(), by_hand, rtol=1e-5, atol=1e-5)
