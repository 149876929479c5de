"""What is written is what was when save() was called, and nothing of what goes wrong is lost."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from zoo.distributed import Channel
from zoo.errors import CheckpointError, DiskFull
from zoo.training import saver as module
from zoo.training.checkpoint import Checkpoint, Snapshot
from zoo.training.engines.base import Piece
from zoo.training.saver import Saver

SECONDS = 30


def snapshot(weight: torch.Tensor, step: int = 1, client: dict | None = None) -> Snapshot:
    pieces = {"weights": {"a": Piece(weight, tuple(weight.shape))}}
    own = {"engine": {"numbers": {"a": {"step": weight.flatten()[:1]}}}}
    return Snapshot(pieces, own, {"step": step, "client": client})


class Gate:
    """Stands for `write`; it goes on when `opened` is set, and notes what it wrote in which thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.opened, self.write, self.threads = threading.Event(), module.write, []
        monkeypatch.setattr(module, "write", self)

    def __call__(self, *arguments) -> None:
        assert self.opened.wait(SECONDS)
        self.threads.append(threading.current_thread().name)
        self.write(*arguments)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_what_is_written_is_what_was_at_the_time_of_save(tmp_path, monkeypatch, asynchronous):
    gate, weight, client = Gate(monkeypatch), torch.arange(6.0).reshape(2, 3), {"seen": [1]}
    if not asynchronous:
        gate.opened.set()
    with Saver(asynchronous, lambda: None) as saver:
        saver.save(tmp_path / "step", snapshot(weight, client=client))
        assert (tmp_path / "step").exists() is not asynchronous
        weight.add_(100)  # training goes on
        client["seen"].append(2)
        gate.opened.set()
    found = Checkpoint(tmp_path / "step", Channel())
    assert torch.equal(found.tensor("weights", "a"), torch.arange(6.0).reshape(2, 3))
    assert found.engine["numbers"]["a"]["step"] == 0
    assert found.shared["client"] == {"seen": [1]}
    assert gate.threads == ["zoo-saver" if asynchronous else threading.current_thread().name]


def test_checkpoints_are_written_one_after_the_other(tmp_path, monkeypatch):
    gate, weight = Gate(monkeypatch), torch.zeros(2, 3)
    done = []
    with Saver(True, lambda: done.append(sorted(path.name for path in tmp_path.iterdir()))) as saver:
        saver.save(tmp_path / "step-1", snapshot(weight, 1))
        weight += 1
        threading.Timer(0.1, gate.opened.set).start()
        saver.save(tmp_path / "step-2", snapshot(weight, 2))
        assert (tmp_path / "step-1").is_dir()
    assert done == [["step-1"], ["step-1", "step-2"]]
    for step in (1, 2):
        assert (Checkpoint(tmp_path / f"step-{step}", Channel()).tensor("weights", "a") == step - 1).all()


@pytest.mark.parametrize(
    "error", [DiskFull("no room left"), CheckpointError("damaged"), TypeError("not JSON")], ids=str
)
@pytest.mark.parametrize("how", ["save", "wait", "end"])
def test_an_error_of_the_thread_comes_at_the_next_occasion_and_once(tmp_path, monkeypatch, error, how):
    def fails(*_):
        raise error

    monkeypatch.setattr(module, "write", fails)
    with pytest.raises(type(error), match=str(error)):
        with Saver(True, lambda: None) as saver:
            saver.save(tmp_path / "a", snapshot(torch.zeros(2, 3)))
            if how == "wait":
                saver.wait()
            if how == "save":
                saver.save(tmp_path / "b", snapshot(torch.zeros(2, 3)))
    saver.wait()


def test_an_error_of_pruning_is_not_lost_either(tmp_path):
    def fails():
        raise PermissionError("checkpoints")

    saver = Saver(True, fails)
    saver.save(tmp_path / "a", snapshot(torch.zeros(2, 3)))
    with pytest.raises(PermissionError, match="checkpoints"):
        saver.wait()


def test_a_run_that_fails_ends_what_it_began_and_raises_its_own(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    with pytest.raises(KeyError, match="own"):
        with Saver(True, lambda: None) as saver:
            saver.save(tmp_path / "step", snapshot(torch.zeros(2, 3)))
            threading.Timer(0.1, gate.opened.set).start()
            raise KeyError("own")
    assert (tmp_path / "step").is_dir()


@pytest.mark.parametrize(("free", "thread"), [(0, False), (4 * 24 - 1, False), (4 * 24, True)])
def test_without_memory_for_a_copy_the_loop_waits(tmp_path, monkeypatch, free, thread):
    """24 bytes, of which the copy may take a fourth of what is free."""
    monkeypatch.setattr(module, "free_memory", lambda: free)
    saver = Saver(None, lambda: None)
    saver.save(tmp_path / "step", snapshot(torch.zeros(2, 3)))
    assert (saver.thread is not None) is thread
    assert bool(saver.staging) is thread
    saver.wait()
    assert (tmp_path / "step").is_dir()


def test_what_one_rank_cannot_copy_none_copies(tmp_path, monkeypatch):
    """They write together."""
    monkeypatch.setattr(module, "free_memory", lambda: float("inf"))
    saver = Saver(None, lambda: None)
    monkeypatch.setattr(saver.channel, "maximum", lambda *_: [1.0])
    saver.save(tmp_path / "step", snapshot(torch.zeros(2, 3)))
    assert saver.thread is None


def test_the_memory_of_the_copy_is_used_again(tmp_path, monkeypatch):
    """The second time it is there already, so that it needs no free memory."""
    saver, weight, places = Saver(None, lambda: None), torch.zeros(2, 3), []
    for step, free in ((1, 1e9), (2, 0)):
        monkeypatch.setattr(module, "free_memory", lambda free=free: free)
        weight += 1
        saver.save(tmp_path / f"step-{step}", snapshot(weight, step))
        assert saver.thread is not None
        saver.wait()
        places.append({key: held.data_ptr() for key, held in saver.staging.items()})
        assert (Checkpoint(tmp_path / f"step-{step}", Channel()).tensor("weights", "a") == step).all()
    assert places[0] == places[1]


def test_strides_and_dtypes_are_kept_by_the_copy(tmp_path):
    for number, weight in enumerate((torch.randn(3, 2).T, torch.arange(6).reshape(2, 3), torch.randn(2, 3).bfloat16())):
        with Saver(True, lambda: None) as saver:
            saver.save(tmp_path / f"{number}", snapshot(weight))
        found = Checkpoint(tmp_path / f"{number}", Channel()).tensor("weights", "a")
        assert found.dtype == weight.dtype and torch.equal(found, weight)


def test_the_free_memory_is_that_of_the_machine():
    free = module.free_memory()
    assert 2**20 < free < 2**50 if Path("/proc/meminfo").exists() else free == float("inf")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_run_ends_the_same_however_it_saves(toy, whole, tmp_path, asynchronous):
    assert toy.same(toy.train(tmp_path, async_save=asynchronous), whole["state"])
    assert toy.lines(tmp_path) == whole["lines"]
    for step in (3, 6, 9, 12):
        mine, theirs = (
            Checkpoint(folder / "checkpoints" / f"step-{step:08d}", Channel()) for folder in (tmp_path, whole["folder"])
        )
        for kind in mine.parts:
            assert all(torch.equal(mine.tensor(kind, name), theirs.tensor(kind, name)) for name in mine.names(kind))


def test_the_memory_of_the_copy_is_taken_once_before_the_first_save(tmp_path):
    saver, weight, asked = Saver(True, lambda: None), torch.ones(2, 3), []
    for _ in range(2):
        saver.prepare(lambda: asked.append(1) or snapshot(weight).pieces)
    saver.wait()
    place = saver.staging["weights", "a"].data_ptr()
    saver.save(tmp_path / "step", snapshot(weight))
    saver.wait()
    assert asked == [1] and saver.staging["weights", "a"].data_ptr() == place
    assert (Checkpoint(tmp_path / "step", Channel()).tensor("weights", "a") == 1).all() and (weight == 1).all()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priorities of their own elsewhere")
def test_training_goes_before_writing(tmp_path, monkeypatch):
    gate, nice = Gate(monkeypatch), []
    gate.opened.set()
    write = gate.write
    gate.write = lambda *words: nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())) or write(*words)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with Saver(True, lambda: None) as saver:
        saver.save(tmp_path / "step", snapshot(torch.zeros(2, 3)))
    assert nice == [10] and os.getpriority(os.PRIO_PROCESS, 0) == before


def test_no_memory_is_taken_where_nothing_is_copied(monkeypatch):
    monkeypatch.setattr(module, "free_memory", lambda: 0)
    for asynchronous in (None, False):
        saver = Saver(asynchronous, lambda: None)
        saver.prepare(lambda: snapshot(torch.ones(2, 3)).pieces)
        saver.wait()
        assert not saver.staging
