"""A rank that is killed at any moment: the others end, nothing is lost, and the run goes on to the same weights."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from zoo import weights
from zoo.distributed import Channel
from zoo.training.checkpoint import Checkpoint

WORKER = Path(__file__).with_name("worker.py")
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


class Ranks:
    """The processes of one start of a run."""

    def __init__(self, folder: Path, settings: dict, world: int, pace: float):
        file = folder.with_suffix(".json")
        usual = {"steps": STEPS, "save_interval": 3, "keep": 100}
        file.write_text(
            json.dumps([{"folder": str(folder), "model": "language", "settings": usual | settings, "pace": pace}])
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.output = folder.with_suffix(".txt").open("a")
        self.processes = []
        for rank in range(world):
            place = shared | {"RANK": rank, "LOCAL_RANK": rank} if world > 1 else {}
            words = {k: str(v) for k, v in (place | {"OMP_NUM_THREADS": 1, "PYTHONPATH": WORKER.parents[2]}).items()}
            command = [sys.executable, str(WORKER), str(file)]
            self.processes.append(
                subprocess.Popen(command, env=os.environ | words, stdout=self.output, stderr=self.output)
            )

    def wait(self, seconds: float) -> list[int]:
        """The exit codes; fails if one does not end in time."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()


def logged(folder: Path) -> list[dict]:
    file = folder / "log.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def kill_one(folder: Path, settings: dict, world: int, seed: random.Random, until: int) -> None:
    """Starts the run and kills one rank at a random moment before step `until`; all must be over soon after."""
    done = logged(folder)[-1]["step"] if logged(folder) else 0
    at = seed.randint(min(done, until - 1), until - 1)
    ranks = Ranks(folder, settings, world, pace=0.02)
    deadline = time.monotonic() + 120
    while (logged(folder)[-1:] or [{"step": 0}])[-1]["step"] <= at and time.monotonic() < deadline:
        if any(process.poll() is not None for process in ranks.processes):
            break
        time.sleep(0.002)
    time.sleep(seed.uniform(0.0, 0.1))
    victim = seed.randrange(world)
    ranks.processes[victim].kill()
    codes = ranks.wait(HANGS)
    assert codes[victim] == -signal.SIGKILL, f"it had ended before it could be killed after step {at}"
    assert all(codes), f"rank {victim} was killed after step {at}, and the others ended with {codes}"
    for path in (folder / "checkpoints").glob("step-*"):
        Checkpoint(path, Channel())  # reads and checks every byte


def check_kills(tmp_path: Path, engine: str, kills: int, seed: int) -> None:
    settings, world, tolerance = ENGINES[engine]
    whole, killed = tmp_path / "whole", tmp_path / "killed"

    def run_to_the_end(folder: Path) -> None:
        codes = Ranks(folder, settings, world, pace=0.0).wait(120)
        assert codes == [0] * world, folder.with_suffix(".txt").read_text()[-2000:]

    run_to_the_end(whole)
    chosen = random.Random(seed)
    for number in range(1, kills + 1):
        before = len(list((killed / "checkpoints").glob("step-*")))
        kill_one(killed, settings, world, chosen, until=(STEPS - 6) * number // kills)
        assert len(list((killed / "checkpoints").glob("step-*"))) >= before
    run_to_the_end(killed)
    expected, found = weights.read(whole), weights.read(killed)
    far = {name: float((found[name] - tensor).abs().max()) for name, tensor in expected.items()}
    assert max(far.values()) <= tolerance, (seed, far)
    for a, b in zip(logged(whole), logged(killed), strict=True):
        assert b["step"] == a["step"]
        assert b["loss"] == pytest.approx(a["loss"], abs=10 * tolerance, rel=0)


def test_a_killed_rank_of_ddp(tmp_path):
    check_kills(tmp_path, "ddp", kills=1, seed=random.randrange(1 << 30))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_twenty_kills_over_the_engines(tmp_path, engine):
    check_kills(tmp_path, engine, kills=4, seed=random.randrange(1 << 30))
