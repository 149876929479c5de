"""What a run says of itself."""

from __future__ import annotations

import builtins
import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from zoo import distributed
from zoo.errors import DiskFull, MissingPackage, TrainingDiverged
from zoo.training.log import PATIENCE, Clock, Log, Meter, keep_lines


def feed(meter: Meter, *updates: tuple[list[float], float]) -> Meter:
    for losses, norm in updates:
        for loss in losses:
            meter.add(torch.tensor(loss))
        meter.close(torch.tensor(norm))
    return meter


def test_the_loss_is_the_mean_of_good_updates_since_the_last_reading():
    meter = feed(Meter(torch.device("cpu")), ([1.0, 3.0], 1.0), ([float("nan"), 1.0], 1.0), ([5.0, 5.0], 1.0))
    assert meter.read(3) == {"loss": 3.5, "left_out": 1}
    assert feed(meter, ([7.0], 1.0)).read(4) == {"loss": 7.0}
    assert feed(meter, ([7.0], float("inf"))).read(5) == {"loss": None, "left_out": 1}


def test_a_stored_meter_goes_on():
    updates = [([1.0, 3.0], 1.0), ([float("nan")], 1.0), ([0.3], 1.0)]
    first, second = feed(Meter(torch.device("cpu")), *updates[:2]), Meter(torch.device("cpu"))
    second.load(json.loads(json.dumps(first.state())))
    assert feed(first, updates[2]).read(3) == feed(second, updates[2]).read(3)


def test_only_bad_updates_in_a_row_are_divergence():
    bad, good = ([float("nan")], 1.0), ([1.0], 1.0)
    meter = feed(Meter(torch.device("cpu")), *[bad] * (PATIENCE - 1), good, *[bad] * (PATIENCE - 1))
    meter.read(1)
    with pytest.raises(TrainingDiverged, match="step 2"):
        feed(meter, bad).read(2)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('{"step": 1}\n{"step": 2}\n{"step": 3}\n', 2),
        ('{"step": 1}\n{"step": 2}\n{"st', 2),
        ('{"step": 1}\n{"step": 2}', 1),
        ('{"step": 1}\n\x00\x00\n{"step": 2}\n', 1),
        ("", 0),
    ],
)
def test_lines_after_the_checkpoint_and_torn_ones_are_cut_off(tmp_path, text, kept):
    file = tmp_path / "log.jsonl"
    file.write_text(text)
    keep_lines(file, 2)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2][:kept]
    keep_lines(tmp_path / "none", 2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_a_full_disk(tmp_path):
    with pytest.raises(DiskFull, match="the same command"):
        with Log(tmp_path / "log.jsonl", 2, 0, progress=False, tensorboard=False) as log:
            os.dup2(os.open("/dev/full", os.O_WRONLY), log.file.fileno())
            log.write({"step": 1})


def test_tensorboard_gets_the_numbers(toy, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    toy.train(tmp_path, tensorboard=True, eval_interval=6, call={"valid_dataset": toy.Points(3)})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [line["loss"] for line in toy.lines(tmp_path)]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)
    assert [event.step for event in events.Scalars("eval/loss")] == [6, 12]


def read_board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Name -> (step, value) of each number on the board."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_takes_lines_with_more_than_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    line = {"step": 3, "loss": 1.5, "left_out": 2, "grad_norm": None, "rank_samples_per_s": [1.0, 2.0], "word": "text"}
    line |= {"layer_norms": {"a": 1.0, "b": None}, "eval": {"loss": 0.5, "R@1": None}}
    with Log(tmp_path / "log.jsonl", 9, 0, progress=False, tensorboard=True) as log:
        log.write(line)
    assert read_board(tmp_path / "tensorboard") == {"loss": [(3, 1.5)], "left_out": [(3, 2)], "eval/loss": [(3, 0.5)]}
    assert json.loads((tmp_path / "log.jsonl").read_text()) == line


def test_a_missing_tensorboard_is_named(toy, tmp_path, monkeypatch):
    imported = builtins.__import__

    def without(name, *rest, **words):
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return imported(name, *rest, **words)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingPackage, match="pip install tensorboard"):
        toy.train(tmp_path, tensorboard=True)


def test_the_clock_counts_waiting_but_not_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("zoo.training.log.time.perf_counter", lambda: now[0])

    def slow():
        for batch in range(2):
            now[0] += 3
            yield batch

    clock = Clock()
    for _ in clock.waiting(slow()):
        now[0] += 1
        clock.samples += 16
        with clock.pause():
            now[0] += 100
    assert clock.read() == {"samples_per_s": 4.0, "data_wait": 0.75, "seconds": 208.0}


def test_a_run_that_went_back_begins_where_it_went_back_to(monkeypatch):
    now = [50.0]
    monkeypatch.setattr("zoo.training.log.time.perf_counter", lambda: now[0])
    clock = Clock()
    clock.go_on(100.0)
    now[0] += 30
    assert clock.seconds() == 130
    clock.go_on(110.0)
    now[0] += 5
    assert clock.seconds() == 115


@pytest.mark.parametrize("last", [0, 1, 4, 6, 9])
def test_a_cut_leaves_the_lines_up_to_a_step_and_the_next_come_after_them(tmp_path, last):
    with Log(tmp_path / "log.jsonl", 9, 0, progress=False, tensorboard=False) as log:
        for step in (2, 4, 6):
            log.write({"step": step, "loss": 1.0})
        log.cut(last)
        kept = [step for step in (2, 4, 6) if step <= last]
        lines = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
        assert lines == kept
        log.write({"step": last + 1, "loss": 2.0})
    lines = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [*kept, last + 1]


def test_without_a_file_there_is_nothing_to_cut():
    with Log(None, 9, 0, progress=False, tensorboard=False) as log:
        log.cut(3)
        log.write({"step": 4})
        log.sync()


@pytest.fixture
def wandb(monkeypatch) -> SimpleNamespace:
    """Stands for the package: `started` are the words of init, `lines` what was logged, `finished` how often."""
    seen = SimpleNamespace(started=[], lines=[], finished=[])
    run = SimpleNamespace(
        log=lambda line, step: seen.lines.append((step, line)), finish=lambda: seen.finished.append(True)
    )
    module = ModuleType("wandb")
    module.init = lambda **words: seen.started.append(words) or run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return seen


def test_wandb_gets_the_lines(toy, tmp_path, wandb):
    toy.train(tmp_path / "first", wandb=True, experiment_name="emoji", layer_norms=True)
    (started,) = wandb.started
    assert started["project"] == "emoji" and started["name"] == "first" and started["dir"] == str(tmp_path / "first")
    assert wandb.lines == [(line["step"], line) for line in toy.lines(tmp_path / "first", times=True)]
    assert wandb.finished == [True]


def test_wandb_is_left_in_order_by_a_run_that_fails(toy, tmp_path, wandb):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.train(tmp_path, toy.Killed(5, stop), wandb=True)
    assert [step for step, _ in wandb.lines] == [2] and wandb.finished == [True]


def test_only_rank_0_speaks(tmp_path, wandb, monkeypatch):
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    with Log(tmp_path / "log.jsonl", 9, 0, progress=True, tensorboard=True, wandb="zoo") as log:
        log.write({"step": 1})
        log.tick()
        log.cut(0)
        log.sync()
    assert list(tmp_path.iterdir()) == [] and wandb.started == []


def test_a_missing_wandb_is_named(toy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # so that importing it fails
    with pytest.raises(MissingPackage, match="pip install wandb"):
        toy.train(tmp_path, wandb=True)
