"""Interrupted anywhere and started again, a run is bit for bit the run that was not."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoo import weights
from zoo.distributed import Channel
from zoo.errors import CheckpointError, DiskFull, SettingsError, WeightsMismatch
from zoo.training import Trainer, run_folder, state_file


class Stop(Exception):
    """Stands for whatever ends a run from inside."""


def stop():
    raise Stop


def flip_a_bit(file: Path) -> None:
    """In the last byte, which is a weight's or a moment's."""
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def in_a_child(function, *arguments) -> int:
    """Runs it in a forked process; its exit code."""
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join()
    return child.exitcode


@pytest.mark.parametrize("at", [1, 2, 6, 7, 8, 13, 20, 24])
def test_a_resumed_run_equals_an_uninterrupted_one(toy, whole, tmp_path, at):
    """Stopped in the forward of micro-batch `at`, of 24: within an update, between two, before any checkpoint."""
    with pytest.raises(Stop):
        toy.train(tmp_path, toy.Killed(at, stop))
    torch.rand(7)  # what happens between must not matter
    assert toy.same(toy.train(tmp_path), whole["state"])
    assert toy.lines(tmp_path) == whole["lines"]
    assert toy.same(weights.read(tmp_path / "model.safetensors"), whole["state"])


@pytest.mark.parametrize("workers", [(2, 2), (0, 2), (2, 0)])
def test_the_number_of_workers_changes_nothing(toy, whole, tmp_path, workers):
    with pytest.raises(Stop):
        toy.train(tmp_path, toy.Killed(15, stop), num_workers=workers[0])
    assert toy.same(toy.train(tmp_path, num_workers=workers[1]), whole["state"])
    assert toy.lines(tmp_path) == whole["lines"]


def test_killed_three_times_by_the_system(toy, whole, tmp_path):
    """SIGKILL in three forwards drawn at random: before the first checkpoint, after it, and after going on from it."""
    places = [int(torch.randint(*bounds, ())) for bounds in ((1, 7), (8, 12), (7, 15))]
    for at in places:
        assert in_a_child(toy.train, tmp_path, toy.Killed(at)) == -signal.SIGKILL, places
    assert toy.same(toy.train(tmp_path), whole["state"]), places
    assert toy.lines(tmp_path) == whole["lines"], places


def test_the_same_command_goes_on_after_sigkill(toy, whole, tmp_path):
    command = [sys.executable, Path(toy.__file__), tmp_path]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    assert subprocess.run([*command, "11"], env=environment).returncode == -signal.SIGKILL
    assert subprocess.run(command, env=environment).returncode == 0
    assert toy.same(weights.read(tmp_path / "model.safetensors"), whole["state"])
    assert toy.lines(tmp_path) == whole["lines"]


@pytest.mark.parametrize("at", range(1, 11, 2))
def test_killed_while_files_are_renamed(toy, whole, tmp_path, monkeypatch, at):
    """SIGKILL at the `at`-th rename of the run: of settings, within a checkpoint, of a checkpoint, of the weights."""

    def run():
        replace, calls = os.replace, []

        def killed(*names):
            calls.append(names)
            if len(calls) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*names)

        monkeypatch.setattr(os, "replace", killed)
        toy.train(tmp_path, save_interval=6)

    assert in_a_child(run) == -signal.SIGKILL
    assert toy.same(toy.train(tmp_path, save_interval=6), whole["state"])
    assert toy.lines(tmp_path) == whole["lines"]


def test_samples_before_the_checkpoint_are_not_read_again(toy, tmp_path):
    with pytest.raises(Stop):
        toy.train(tmp_path, toy.Killed(19, stop))  # the checkpoint is of step 9, after 18 micro-batches
    data = toy.Points()
    toy.train(tmp_path, data=data)
    assert len(data.read) == (24 - 18) * 4


def test_a_finished_run_returns_at_once(toy, whole):
    data, model = toy.Points(), toy.Net(seed=5)
    toy.train(whole["folder"], model, data)
    assert data.read == []
    assert toy.same(model, whole["state"])
    assert toy.lines(whole["folder"]) == whole["lines"]


def test_a_finished_run_writes_weights_that_were_removed(toy, whole, tmp_path):
    folder = shutil.copytree(whole["folder"], tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    toy.train(folder)
    assert toy.same(weights.read(folder / "model.safetensors"), whole["state"])


@pytest.mark.parametrize("how", ["truncated", "json", "missing", "empty", "bit flipped", "no manifest"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(toy, whole, tmp_path, caplog, how):
    with pytest.raises(Stop):
        toy.train(tmp_path, toy.Killed(19, stop))
    newest = tmp_path / "checkpoints" / "step-00000009"
    if how == "truncated":
        os.truncate(newest / "rank-00000.pieces.safetensors", 300)
    elif how == "json":
        (newest / "state.json").write_text('{"tensors": 1')
    elif how == "missing":
        (newest / "rank-00000.safetensors").unlink()
    elif how == "bit flipped":
        flip_a_bit(newest / "rank-00000.pieces.safetensors")
    elif how == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        for file in newest.iterdir():
            file.write_bytes(b"")
    data = toy.Points()
    assert toy.same(toy.train(tmp_path, data=data), whole["state"])
    assert len(data.read) == (24 - 12) * 4
    assert "step-00000009 cannot be used" in caplog.text
    assert toy.lines(tmp_path) == whole["lines"]
    assert newest.with_name("damaged-step-00000009").is_dir()


def test_if_all_checkpoints_are_damaged_nothing_is_thrown_away(toy, tmp_path):
    with pytest.raises(Stop):
        toy.train(tmp_path, toy.Killed(19, stop))
    for file in tmp_path.glob("checkpoints/*/state.json"):
        file.write_text("{")
    with pytest.raises(CheckpointError, match="choose a new run_folder"):
        toy.train(tmp_path)
    assert len(list(tmp_path.glob("checkpoints/step-*"))) == 3


def test_another_model_is_not_loaded(toy, whole, tmp_path):
    folder = shutil.copytree(whole["folder"], tmp_path / "copy")
    other = toy.Net()
    other.more = torch.nn.Linear(2, 2)
    with pytest.raises(WeightsMismatch, match="more.weight"):
        toy.train(folder, other)


def test_a_full_disk_leaves_the_checkpoints_before_and_the_run_goes_on(toy, whole, tmp_path, monkeypatch):
    write, room = weights.write, [3]

    def limited(state, path, **words):
        room[0] -= 1
        if room[0] < 0:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(state, path, **words)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "write", limited)  # each checkpoint writes two files: the second one does not fit
        with pytest.raises(DiskFull, match="step-00000006"):
            toy.train(tmp_path)
    assert [path.name for path in tmp_path.glob("checkpoints/*")] == ["step-00000003"]
    assert toy.same(toy.train(tmp_path), whole["state"])
    assert toy.lines(tmp_path) == whole["lines"]


@pytest.mark.parametrize(
    "changed",
    [{"batch_size": 2}, {"lr": 0.5}, {"seed": 7}, {"steps": 13}, {"weight_decay": 0.0}, {"precision": "bf16"}],
    ids=str,
)
def test_settings_that_change_the_result_are_refused_by_name(toy, whole, changed):
    (name, value), *_ = changed.items()
    with pytest.raises(SettingsError, match="new run_folder") as error:
        toy.train(whole["folder"], **changed)
    said = {"steps": "total_steps", "batch_size": "samples_per_update"}.get(name, name)
    assert said in str(error.value)
    assert str(2 * value if name == "batch_size" else value) in str(error.value)


def test_other_training_data_are_refused(toy, whole):
    with pytest.raises(SettingsError, match="samples.*22.*23"):
        toy.train(whole["folder"], data=toy.Points(23))


def test_another_optimizer_is_refused(toy, whole):
    model = toy.Net()
    with pytest.raises(SettingsError, match="optimizer.*AdamW.*SGD"):
        toy.train(whole["folder"], model, call={"optimizer": torch.optim.SGD(model.parameters(), lr=1e-2)})


def test_settings_that_do_not_may_change(toy, whole, tmp_path):
    with pytest.raises(Stop):
        toy.train(tmp_path, toy.Killed(13, stop))
    changed = dict(log_interval=5, save_interval=4, num_workers=1, keep=1, experiment_name="other")
    assert toy.same(toy.train(tmp_path, **changed), whole["state"])


def test_a_run_may_grow_if_its_schedule_does_not_depend_on_the_end(toy, tmp_path):
    constant = dict(lr_decay="constant", warm_up=2)
    toy.train(tmp_path / "a", steps=5, **constant)
    grown = toy.train(tmp_path / "a", steps=8, **constant)
    assert toy.same(grown, toy.train(tmp_path / "b", steps=8, **constant))
    assert toy.same(weights.read(tmp_path / "a" / "model.safetensors"), grown)
    toy.train(tmp_path / "c", steps=5, lr_decay="constant", warm_up=0.4)
    with pytest.raises(SettingsError, match="total_steps"):
        toy.train(tmp_path / "c", steps=8, lr_decay="constant", warm_up=0.4)


def test_a_client_scheduler_and_optimizer_are_resumed(toy, tmp_path):
    def run(folder, model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
        return toy.train(folder, model, call=dict(optimizer=optimizer, lr_scheduler=scheduler), lr=None)

    expected = run(tmp_path / "a", toy.Net())
    with pytest.raises(Stop):
        run(tmp_path / "b", toy.Killed(15, stop))
    assert toy.same(run(tmp_path / "b", toy.Net()), expected)
    assert toy.lines(tmp_path / "b") == toy.lines(tmp_path / "a")
    assert {line["lr"] for line in toy.lines(tmp_path / "a")} == {0.05, 0.025, 0.0125}


def test_bf16_is_resumed_exactly(toy, tmp_path):
    expected = toy.train(tmp_path / "a", precision="bf16")
    with pytest.raises(Stop):
        toy.train(tmp_path / "b", toy.Killed(15, stop), precision="bf16")
    assert toy.same(toy.train(tmp_path / "b", precision="bf16"), expected)


def test_the_best_weights_are_kept_across_an_interruption(toy, tmp_path):
    """The numbers are 3, 2, 1, ... at steps 2, 4, ...: the best are of step 2, also if the run went on from step 3."""

    def run(folder, model):
        numbers = {2: 3.0, 4: 2.0, 6: 1.0}
        log = folder / "log.jsonl"

        def evaluate(model):
            before = toy.lines(folder)[-1]["step"] if log.stat().st_size else 0
            return {"R@1": numbers.get(before + 2, 0.0)}

        best = dict(eval_interval=2, best="R@1", maximise=True)
        return toy.train(folder, model, call={"evaluate": evaluate}, **best)

    run(tmp_path / "a", toy.Net())
    with pytest.raises(Stop):
        run(tmp_path / "b", toy.Killed(11, stop))
    run(tmp_path / "b", toy.Net())
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert '"step": 2' in (folder / "best" / "metrics.json").read_text()
    best = [weights.read(tmp_path / name / "best") for name in ("a", "b")]
    assert toy.same(*best)
    assert not toy.same(best[0], weights.read(tmp_path / "a"))


def test_two_runs_cannot_share_a_folder(toy, tmp_path):
    with run_folder.RunFolder(tmp_path).alone(Channel()), pytest.raises(SettingsError, match="another process"):
        toy.train(tmp_path)
    toy.train(tmp_path, steps=1)


def test_without_a_run_folder_nothing_is_written(toy, whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert toy.same(toy.train(None), whole["state"])
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_holds_the_generators(toy, whole):
    """Not only equal results: what a checkpoint says of chance is what chance was."""
    folder = whole["folder"] / "checkpoints" / "step-00000006"
    assert state_file.read(folder, "rank-00000")["rng"].keys() == {"python", "numpy", "torch"}
    assert state_file.read(folder, "state")["step"] == 6


def test_trainer_is_the_public_one():
    import zoo

    assert zoo.Trainer is Trainer
