"""Which samples make which batch."""

from __future__ import annotations

import itertools

import pytest
import torch

from zoo.training.batches import EpochSampler, even_batches, length


def numbers(sampler: EpochSampler, start: int, stop: int) -> list[int]:
    return [i for _, batch in sampler.between(start, stop) for i in batch]


def test_an_epoch_holds_each_sample_once_but_for_the_last_incomplete_batch():
    sampler = EpochSampler(22, 4, seed=1)
    first, second = numbers(sampler, 0, 5), numbers(sampler, 5, 10)
    assert len(set(first)) == len(set(second)) == 20
    assert first != second
    assert first != sorted(first)


def test_an_order_follows_from_the_seed_and_any_position_can_be_returned_to():
    all_of_it = list(EpochSampler(22, 4, seed=1).between(0, 30))
    for start in (1, 4, 5, 6, 17):
        assert list(EpochSampler(22, 4, seed=1).between(start, 30)) == all_of_it[start:]
    assert list(EpochSampler(22, 4, seed=2).between(0, 30)) != all_of_it


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 4), (4, 2)])
def test_ranks_see_together_what_one_process_sees(world_size, batch_size):
    one = list(EpochSampler(22, 8, seed=1).between(0, 6))
    ranks = [EpochSampler(22, batch_size, seed=1, rank=r, world_size=world_size) for r in range(world_size)]
    for whole, *parts in zip(one, *(sampler.between(0, 6) for sampler in ranks), strict=True):
        assert list(itertools.chain(*(part for _, part in parts))) == whole[1]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_too_few_samples_for_a_batch_are_one_batch_of_equal_shares(samples, world_size):
    ranks = [EpochSampler(samples, 8, seed=1, rank=r, world_size=world_size) for r in range(world_size)]
    shares = [numbers(sampler, 0, sampler.per_epoch) for sampler in ranks]
    assert set(itertools.chain(*shares)) == set(range(samples))
    assert len({len(share) for share in shares}) == 1


@pytest.mark.parametrize("samples", [1, 7, 8, 9, 16, 17, 31])
def test_evaluation_reads_each_sample_once_in_even_batches(samples):
    batches = [batch for _, batch in even_batches(samples, 8)]
    assert list(itertools.chain(*batches)) == list(range(samples))
    assert max(map(len, batches)) <= 8
    assert max(map(len, batches)) - min(map(len, batches)) <= 1


def test_evaluation_shares_are_equal_and_disjoint():
    ranks = [list(even_batches(21, 4, rank=r, world_size=2)) for r in range(2)]
    for (_, first), (_, second) in zip(*ranks, strict=True):
        assert len(first) == len(second)
        assert not set(first) & set(second)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"name": ["a"], "x": torch.zeros(3, 2)}, 3),
        ((torch.zeros(4),), 4),
        (torch.zeros(5), 5),
        ({"scale": torch.tensor(1.0)}, 1),
        ("text", 1),
    ],
)
def test_a_batch_is_as_long_as_its_first_tensor(batch, expected):
    assert length(batch) == expected
