"""Merging by ids gives what byte-pair encoding is defined to give, with dropout and without."""

from __future__ import annotations

import random

import pytest

from zoo.tokenizers.merging import merge


def slow_merge(ids, rules, drop=lambda: False):
    """Algorithm 1 of Provilkov et al. 2020, read aloud: look at all pairs, keep those not dropped, take the best."""
    ids = list(ids)
    while True:
        pairs = [(rules[pair], at) for at, pair in enumerate(zip(ids, ids[1:], strict=False)) if pair in rules]
        kept = [(rank, at, made) for (rank, made), at in sorted(pairs) if not drop()]
        if not kept:
            return ids
        _, at, made = min(kept)
        ids[at : at + 2] = [made]


def random_rules(chance: random.Random, letters: int, count: int) -> dict:
    """Rules each of whose pieces is a letter or was made by a rule before; two may make the same piece."""
    rules = {}
    for rank in range(count):
        pair = chance.randrange(letters + rank), chance.randrange(letters + rank)
        rules.setdefault(pair, (rank, letters + rank))
    return rules


def test_merging_is_the_definition_for_random_vocabularies():
    chance = random.Random(0)
    for _ in range(300):
        rules = random_rules(chance, letters=3, count=12)
        word = [chance.randrange(3) for _ in range(chance.randrange(24))]
        assert merge(word, rules) == slow_merge(word, rules)


def test_the_lowest_rank_is_first_and_of_one_rank_the_leftmost():
    a, b, c, bc, ab, aa = range(6)
    assert merge([a, b, c], {(b, c): (0, bc), (a, b): (1, ab)}) == [a, bc]
    assert merge([a, b, c], {(b, c): (1, bc), (a, b): (0, ab)}) == [ab, c]
    assert merge([a, a, a], {(a, a): (0, aa)}) == [aa, a]


def test_words_without_a_merge_stay_as_they_are():
    rules = {(0, 1): (0, 2)}
    assert merge([], rules) == [] and merge([0], rules) == [0] and merge([1, 0], rules) == [1, 0]


def test_what_is_always_dropped_is_never_merged_and_what_is_dropped_once_comes_back():
    rules = {(0, 1): (0, 3), (1, 2): (1, 4), (4, 0): (2, 5)}
    assert merge([0, 1, 2], rules, lambda: True) == [0, 1, 2]
    # (0, 1) is dropped, so (1, 2) is merged; then (0, 1) is no neighbourhood any more.
    assert merge([0, 1, 2], rules, iter([True, False]).__next__) == [0, 4]
    # Dropped in the first step, taken in the second.
    assert merge([0, 1, 1, 2], rules, iter([True, False, False]).__next__) == [3, 4]


@pytest.mark.parametrize("dropout", [0.1, 0.5])
def test_dropout_has_the_distribution_of_the_definition(dropout):
    rules = {(0, 1): (0, 3), (1, 2): (1, 4), (3, 2): (2, 5), (0, 4): (3, 6), (5, 0): (4, 7)}
    word, many = [0, 1, 2, 0, 1, 2], 20_000
    counts = []
    for seed, merging in enumerate((merge, slow_merge)):
        chance = random.Random(seed)
        found = [tuple(merging(word, rules, lambda: chance.random() < dropout)) for _ in range(many)]  # noqa: B023
        counts.append({ids: found.count(ids) / many for ids in set(found)})
    for ids in counts[0].keys() | counts[1].keys():
        # Four standard deviations of a difference of two shares are at most 0.02.
        assert counts[0].get(ids, 0) == pytest.approx(counts[1].get(ids, 0), abs=0.02), ids


def test_a_very_long_word_takes_no_quadratic_time():
    # The definition takes hours for this one.
    assert merge([0, 1] * 50_000, {(0, 1): (0, 2), (2, 2): (1, 3)}) == [3] * 25_000
