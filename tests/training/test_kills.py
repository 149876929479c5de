"""A rank that is killed at any moment: the others end, nothing is lost, and the run goes on to the same weights."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from zoo import weights
from zoo.distributed import Channel
from zoo.training.checkpoint import Checkpoint

STEPS, HANGS = 30, 30.0


def zero(stage: int, **offload: str) -> dict:
    rows = {f"offload_{what}": {"device": device} for what, device in offload.items()}
    return {"env_type": "deepspeed", "deepspeed_config": {"zero_optimization": {"stage": stage, **rows}}}


ENGINES = {  # settings, processes, and how close the weights must be
    "pytorch": ({"env_type": "pytorch"}, 1, 0.0),
    "ddp": ({"env_type": "pytorchDDP"}, 2, 0.0),
    "zero1": (zero(1), 2, 1e-6),
    "zero2-offload": (zero(2, optimizer="cpu"), 2, 1e-6),
    "zero3-offload": (zero(3, optimizer="cpu", param="cpu"), 2, 1e-6),
}


def start(ranks, folder: Path, settings: dict, world: int, pace: float) -> list[subprocess.Popen]:
    """The processes of one start of the run."""
    file, usual = folder.with_suffix(".json"), {"steps": STEPS, "save_interval": 3, "keep": 100}
    job = {"folder": str(folder), "model": "language", "settings": usual | settings, "pace": pace}
    file.write_text(json.dumps([job]))
    with folder.with_suffix(".txt").open("a") as output:
        return ranks.start(file, world, output)


def logged(folder: Path) -> list[dict]:
    file = folder / "log.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def kill_one(ranks, folder: Path, settings: dict, world: int, seed: random.Random, until: int) -> None:
    """Starts the run and kills one rank at a random moment before step `until`; all must be over soon after."""
    done = logged(folder)[-1]["step"] if logged(folder) else 0
    at = seed.randint(min(done, until - 1), until - 1)
    processes = start(ranks, folder, settings, world, pace=0.02)
    deadline = time.monotonic() + 120
    while (logged(folder)[-1:] or [{"step": 0}])[-1]["step"] <= at and time.monotonic() < deadline:
        if any(process.poll() is not None for process in processes):
            break
        time.sleep(0.002)
    time.sleep(seed.uniform(0.0, 0.1))
    victim = seed.randrange(world)
    processes[victim].kill()
    codes = ranks.wait(processes, HANGS)
    assert codes[victim] == -signal.SIGKILL, f"it had ended before it could be killed after step {at}"
    assert all(codes), f"rank {victim} was killed after step {at}, and the others ended with {codes}"
    for path in (folder / "checkpoints").glob("step-*"):
        Checkpoint(path, Channel())  # reads and checks every byte


def check_kills(ranks, tmp_path: Path, engine: str, kills: int, seed: int) -> None:
    settings, world, tolerance = ENGINES[engine]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def run_to_the_end(folder: Path) -> None:
        codes = ranks.wait(start(ranks, folder, settings, world, pace=0.0), 120)
        assert codes == [0] * world, folder.with_suffix(".txt").read_text()[-2000:]

    run_to_the_end(whole)
    chosen = random.Random(seed)
    for number in range(1, kills + 1):
        before = len(list((killed / "checkpoints").glob("step-*")))
        kill_one(ranks, killed, settings, world, chosen, until=(STEPS - 6) * number // kills)
        assert len(list((killed / "checkpoints").glob("step-*"))) >= before
    run_to_the_end(killed)
    expected, found = weights.read(whole), weights.read(killed)
    far = {name: float((found[name] - tensor).abs().max()) for name, tensor in expected.items()}
    assert max(far.values()) <= tolerance, (seed, far)
    for a, b in zip(logged(whole), logged(killed), strict=True):
        assert b["step"] == a["step"]
        assert b["loss"] == pytest.approx(a["loss"], abs=10 * tolerance, rel=0)


def test_a_killed_rank_of_ddp(tmp_path, ranks):
    check_kills(ranks, tmp_path, "ddp", kills=1, seed=random.randrange(1 << 30))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_twenty_kills_over_the_engines(tmp_path, ranks, engine):
    check_kills(ranks, tmp_path, engine, kills=4, seed=random.randrange(1 << 30))
