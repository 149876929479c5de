"""What DDP sends, by formula; here by one process, which sends to itself. Two are in test_engines.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from zoo.training.engines.reduce import _START, Reduce

SIZES = [64, 16, 16, 16, 16, 1]  # of the toy's parameters: (16, 4), (16,), (16,), (16,), (1, 16), (1,)


@pytest.fixture(autouse=True)
def alone():
    """The process group that a run opens is closed after it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


class Counts:
    """Stands for PowerSGD's state, which counts the numbers that it sent so far."""

    total_numel_after_compression = 0


def test_what_is_sent_whole_is_the_same_for_every_update():
    reduce = Reduce(400)
    assert reduce.figures() == {}
    for updates in (1, 3):
        for _ in range(updates):
            reduce.count()
        assert reduce.figures() == {"bytes_sent": 400}
    assert reduce.figures() == {}


def test_powersgd_sends_all_until_it_compresses_and_then_its_numbers_in_fp32():
    reduce, state = Reduce(400, Counts()), None
    state = reduce.state
    reduce.count()
    assert reduce.figures() == {"bytes_sent": 400}
    reduce.count()
    state.total_numel_after_compression += 30
    reduce.count()
    assert reduce.figures() == {"bytes_sent": (400 + 120) / 2}
    state.total_numel_after_compression += 30
    reduce.count()
    assert reduce.figures() == {"bytes_sent": 120}


def test_one_process_under_ddp_is_one_process(toy, whole, tmp_path):
    assert toy.same(toy.train(tmp_path, env_type="pytorchDDP"), whole["state"])
    lines = toy.lines(tmp_path)
    assert {line.pop("bytes_sent") for line in lines} == {4 * sum(SIZES)}
    assert lines == whole["lines"]


@pytest.mark.parametrize(("how", "width"), [("bf16", 2), ("fp16", 2)])
def test_half_precision_sends_half_and_rounds(toy, tmp_path, how, width):
    """Each gradient is rounded once: after one step of SGD the weights tell which."""

    def stepped(reduce: str) -> dict:
        model = toy.Net(dropout=0.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        words = dict(env_type="pytorchDDP", reduce=reduce, steps=1, warm_up=0, lr=None, clip_grad=0, log_interval=1)
        toy.train(tmp_path / reduce, model, call={"optimizer": optimizer}, **words)
        return {name: toy.Net().state_dict()[name] - tensor for name, tensor in model.state_dict().items()}

    whole, half = stepped("default"), stepped(how)
    assert {line["bytes_sent"] for line in toy.lines(tmp_path / how)} == {width * sum(SIZES)}
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[how]
    for name, gradient in whole.items():
        torch.testing.assert_close(half[name], gradient.to(dtype).float(), rtol=0, atol=1e-6)
    assert any(not torch.equal(half[name], gradient) for name, gradient in whole.items())


@pytest.mark.parametrize(("how", "rank"), [("powersgd", 1), ("powersgd:1", 1), ("powersgd:2", 2)])
def test_powersgd_sends_two_thin_matrices(toy, tmp_path, how, rank):
    """Vogels et al. 2019: (n, m) goes as (n, r) and (m, r), if that is less than half of it. Of the toy's only the
    first does, and only at rank 1: 20 numbers for 64."""
    toy.train(tmp_path, env_type="pytorchDDP", reduce=how, steps=_START + 3, log_interval=1)
    sent = [line["bytes_sent"] for line in toy.lines(tmp_path)]
    thin = sum(SIZES) - 64 + 20 if rank == 1 else sum(SIZES)
    assert sent == [4 * sum(SIZES)] * _START + [4 * thin] * 3


def test_with_accumulation_gradients_are_sent_once_per_update(toy, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(Reduce, "count", lambda self: calls.append(1))
    toy.train(None, env_type="pytorchDDP", gradient_accumulation_steps=3, steps=4)
    assert len(calls) == 4
