"""Alone, everything is the identity; two processes hear each other, and gradients flow between them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from zoo import distributed
from zoo.distributed import Channel, gather, share_buffers, total

SECONDS = 60


def join(function: Callable[[int], None], number: int, count: int, store: Path) -> None:
    limit = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=count, timeout=limit)
    function(number)


def together(function: Callable[[int], None], store: Path, count: int = 2) -> None:
    """Calls function(rank) in so many forked processes; each must end well."""
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=join, args=(function, number, count, store)) for number in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(SECONDS)
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * count


def test_alone_everything_is_the_identity():
    assert (distributed.rank(), distributed.world_size(), distributed.is_distributed()) == (0, 1, False)
    x, model, channel = torch.randn(3, 2, requires_grad=True), nn.BatchNorm1d(2), Channel()
    assert gather(x) is x and total(x) is x
    share_buffers(model)
    assert channel.maximum(1.0, -2) == channel.total(1.0, -2) == [1.0, -2]
    for value in (None, {"a": [1]}, "text"):
        assert channel.exchange(value) == [value]


def test_a_group_of_one_is_alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        test_alone_everything_is_the_identity()
    finally:
        dist.destroy_process_group()


def test_ranks_hear_each_other(tmp_path):
    """Whatever JSON can hold, of any length, in rank order; the largest and the sum of each number."""

    def talk(rank: int) -> None:
        channel, other = Channel(), Channel()
        assert (distributed.rank(), distributed.world_size()) == (rank, 3)
        words = ["", {"names": ["火山", 'a"b\n'], "n": None}, ["long" * 5000]]
        assert channel.exchange(words[rank]) == words
        assert other.exchange(rank) == [0, 1, 2]
        assert channel.maximum(rank, -rank, 2.5) == [2, 0, 2.5]
        assert channel.total(rank, 1 - 2 * rank, 1e300) == [3, -3, 3e300]
        assert channel.exchange() == [None] * 3

    together(talk, tmp_path / "store", 3)


def test_gathered_rows_carry_the_gradients_of_every_rank(tmp_path):
    """The mean over ranks of each one's loss over all rows has, at this rank's rows, the gradient of one process."""
    torch.manual_seed(0)
    rows, weight = torch.randn(4, 3), torch.randn(3, 3)
    one = rows.clone().requires_grad_()
    expected = (one @ weight @ one.T).logsumexp(1).mean()
    expected.backward()

    def check(rank: int) -> None:
        mine = rows[2 * rank : 2 * rank + 2].clone().requires_grad_()
        whole = gather(mine)
        assert torch.equal(whole, rows)
        loss = (whole @ weight @ whole.T).logsumexp(1).mean()
        torch.testing.assert_close(loss, expected)
        (loss / 2).backward()  # averaged over the ranks, as every engine does
        torch.testing.assert_close(mine.grad, one.grad[2 * rank : 2 * rank + 2])

    together(check, tmp_path / "store")


def test_a_total_is_the_sum_of_all_ranks_and_leaves_each_its_own(tmp_path):
    def check(rank: int) -> None:
        for mine in (torch.tensor([1.5, -rank], requires_grad=True), torch.tensor([[2 + rank]])):
            kept = mine.detach().clone()
            found = total(mine)
            assert found.tolist() == ([3.0, -1] if mine.dim() == 1 else [[5]]) and not found.requires_grad
            assert torch.equal(mine, kept)

    together(check, tmp_path / "store")


def test_buffers_become_those_of_rank_0(tmp_path):
    def check(rank: int) -> None:
        model = nn.BatchNorm1d(2)
        model.running_mean.fill_(rank + 5)
        model.num_batches_tracked.fill_(rank + 7)
        with torch.no_grad():
            model.weight.fill_(rank)
        share_buffers(model)
        assert model.running_mean.tolist() == [5, 5] and model.num_batches_tracked == 7
        assert model.weight.tolist() == [rank, rank]  # parameters are the engine's

    together(check, tmp_path / "store")
