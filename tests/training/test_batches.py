"""Which samples make which batch."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from zoo import distributed
from zoo.errors import EmptyDataset
from zoo.training.batches import EpochSampler, LoaderBatches, even_batches, length, open_batches
from zoo.training.settings import Settings


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


@pytest.mark.parametrize("samples", [16, 22, 50])
def test_an_update_sees_the_same_samples_however_it_is_cut(samples):
    """16 samples, in the order of the epoch, by any ranks and micro-batches that make 16; over four epochs."""

    def updates(world_size: int, micro: int) -> list[tuple[int, list[list[int]]]]:
        """(epoch, the samples of each micro-batch of all ranks) of every update."""
        size = 16 // (world_size * micro)
        ranks = [EpochSampler(samples, size, 3, rank=r, world_size=world_size, micro=micro) for r in range(world_size)]
        per_epoch = {sampler.per_epoch for sampler in ranks}
        assert per_epoch == {samples // 16 * micro}
        stop = 4 * per_epoch.pop()
        rows = list(zip(*(sampler.between(0, stop) for sampler in ranks), strict=True))
        assert all(len(numbers) == size for row in rows for _, numbers in row)
        whole = [(row[0][0], [i for _, numbers in row for i in numbers]) for row in rows]
        return [(whole[at][0], [i for _, part in whole[at : at + micro] for i in part]) for at in range(0, stop, micro)]

    expected = updates(1, 1)
    assert [epoch for epoch, _ in expected] == [epoch for epoch in range(4) for _ in range(samples // 16)]
    for epoch in range(4):
        seen = [i for at, numbers in expected if at == epoch for i in numbers]
        assert len(set(seen)) == len(seen)
    for world_size, micro in itertools.product((1, 2, 4), repeat=2):
        assert updates(world_size, micro) == expected


GROUPS = torch.tensor([i % 7 % 3 for i in range(50)])  # 22, 14 and 14 samples


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 2), (4, 1)])
def test_samples_of_a_group_are_batched_together(world_size, batch_size):
    ranks = [EpochSampler(50, batch_size, 3, rank=r, world_size=world_size, groups=GROUPS) for r in range(world_size)]
    assert {sampler.per_epoch for sampler in ranks} == {22 // 4 + 14 // 4 + 14 // 4}
    stop = 12 * ranks[0].per_epoch
    rows = list(zip(*(sampler.between(0, stop) for sampler in ranks), strict=True))
    together = [(row[0][0], [i for _, part in row for i in part]) for row in rows]
    assert together == list(EpochSampler(50, 4, 3, groups=GROUPS).between(0, stop))
    assert all(len(set(GROUPS[numbers].tolist())) == 1 and len(set(numbers)) == 4 for _, numbers in together)
    for epoch in range(12):
        seen = [i for at, numbers in together if at == epoch for i in numbers]
        assert len(seen) == len(set(seen)) == 44
    assert {i for _, numbers in together for i in numbers} == set(range(50))  # what is left out is not always the same
    groups = [int(GROUPS[numbers[0]]) for at, numbers in together if at == 0]
    assert groups != sorted(groups)


@pytest.mark.parametrize("micro", [1, 3])
def test_any_position_among_groups_can_be_returned_to(micro):
    sampler = EpochSampler(50, 4, 1, micro=micro, groups=GROUPS)
    assert sampler.per_epoch == 11 // micro * micro
    whole = list(sampler.between(0, 40))
    for start in (1, 9, 11, 25):
        assert list(EpochSampler(50, 4, 1, micro=micro, groups=GROUPS).between(start, 40)) == whole[start:]


def test_groups_that_never_fill_a_batch_are_told_once_with_what_to_do(caplog):
    class Shapes(torch.utils.data.TensorDataset):
        groups, group_names = torch.tensor([0] * 5 + [1] * 2 + [2] * 9 + [4] * 3), ["a", "b", "c", "d", "e"]

    shapes = Shapes(torch.zeros(19))
    for batch_size, told in ((4, "5 samples are never seen, .* has 4: 2 of b, 3 of e; lower batch_size"), (2, None)):
        caplog.clear()
        batches = open_batches(shapes, Settings(batch_size=batch_size, steps=1), None)
        list(batches.between(0, 8))
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == (told is not None) and (not told or re.search(told, said[0]))


def test_groups_that_are_all_smaller_than_a_batch_are_refused():
    with pytest.raises(EmptyDataset, match="no group has the 32 samples"):
        EpochSampler(50, 32, 1, groups=GROUPS)


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


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("samples", [5, 7, 8, 21, 40, 41])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_evaluation_leaves_out_fewer_samples_than_there_are_ranks(samples, world_size, batch_size):
    ranks = [list(even_batches(samples, batch_size, rank=r, world_size=world_size)) for r in range(world_size)]
    sizes = [[len(numbers) for _, numbers in batches] for batches in ranks]
    assert all(of_rank == sizes[0] for of_rank in sizes)
    assert max(sizes[0]) <= batch_size and max(sizes[0]) - min(sizes[0]) <= 1
    seen = [i for batches in ranks for _, numbers in batches for i in numbers]
    assert len(set(seen)) == len(seen) and samples - len(seen) < world_size
    # A batch of all ranks is what one process sees: a loss over gathered features is the same.
    together = [[i for _, part in row for i in part] for row in zip(*ranks, strict=True)]
    assert [i for batch in together for i in batch] == list(range(len(seen)))


# --- a client's DataLoader -------------------------------------------------------------------------------------------
def shares(monkeypatch, loader, world_size: int, start: int, stop: int) -> list[list[tuple[int, list[int]]]]:
    """(epoch, samples) of each rank's micro-batches."""
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    found = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found.append([(epoch, batch.tolist()) for epoch, batch in LoaderBatches(loader(), 5).between(start, stop)])
    return found


@pytest.mark.parametrize(("world_size", "per_epoch"), [(2, 3), (3, 2), (4, 1)])
def test_ranks_take_a_loaders_batches_in_turn(monkeypatch, world_size, per_epoch):
    """7 batches: no rank has one more than another, and in an epoch none is read twice."""
    loader = lambda: DataLoader(range(14), 2, shuffle=True)  # noqa: E731
    ranks = shares(monkeypatch, loader, world_size, 0, 3 * per_epoch)
    (alone,) = shares(monkeypatch, loader, 1, 0, 21)
    for epoch in range(3):
        of_ranks = [[numbers for at, numbers in batches if at == epoch] for batches in ranks]
        assert {len(batches) for batches in of_ranks} == {per_epoch}
        of_one = [numbers for at, numbers in alone if at == epoch]
        in_turn = [numbers for row in zip(*of_ranks, strict=True) for numbers in row]
        assert in_turn == of_one[: len(in_turn)]
        assert len({i for numbers in in_turn for i in numbers}) == 2 * len(in_turn)


def test_a_position_within_a_loaders_epoch_is_returned_to(monkeypatch):
    loader = lambda: DataLoader(range(14), 2, shuffle=True)  # noqa: E731
    whole = shares(monkeypatch, loader, 2, 0, 12)
    for start in (1, 3, 4, 8):
        assert shares(monkeypatch, loader, 2, start, 12) == [batches[start:] for batches in whole]


def test_a_sampler_that_shares_itself_is_left_to_it(monkeypatch):
    def of_rank():
        sampler = DistributedSampler(range(16), 2, distributed.rank(), seed=1)
        return DataLoader(range(16), 2, sampler=sampler)

    ranks = shares(monkeypatch, of_rank, 2, 0, 8)
    for epoch in (0, 1):
        numbers = [i for batches in ranks for at, batch in batches if at == epoch for i in batch]
        assert sorted(numbers) == list(range(16))
    first, second = ([batch for at, batch in ranks[0] if at == epoch] for epoch in (0, 1))
    assert first != second  # set_epoch was called


def test_a_stream_without_a_length_is_shared_too(monkeypatch):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(10))

    ranks = shares(monkeypatch, lambda: DataLoader(Stream(), 2), 2, 0, 4)
    assert ranks == [
        [(0, [0, 1]), (0, [4, 5]), (1, [0, 1]), (1, [4, 5])],
        [(0, [2, 3]), (0, [6, 7]), (1, [2, 3]), (1, [6, 7])],
    ]


def test_a_loader_of_fewer_batches_than_ranks_is_refused(monkeypatch):
    with pytest.raises(EmptyDataset, match="1 batches for 2 processes.*drop_last"):
        shares(monkeypatch, lambda: DataLoader(range(2), 2), 2, 0, 1)
