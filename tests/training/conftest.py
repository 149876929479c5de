"""The toy model and data of these tests, as a module: `toy.train(folder)`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import IO

import pytest

from zoo.training.workers import free_port


@pytest.fixture(scope="session")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zoo_training_toy", Path(__file__).with_name("toy.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # worker processes look the classes up by their module's name
    spec.loader.exec_module(module)
    return module


def start(jobs: Path, world: int, output: IO[str]) -> list[subprocess.Popen]:
    """The processes that do the jobs of worker.py together; one alone if `world` is 1."""
    worker = Path(__file__).with_name("worker.py")
    shared = {"OMP_NUM_THREADS": 1, "PYTHONPATH": worker.parents[2]}
    place = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [place | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(world)] if world > 1 else [{}]
    environments = [os.environ | {k: str(v) for k, v in (shared | rank).items()} for rank in ranks]
    words = {"stdout": output, "stderr": output, "start_new_session": True}
    return [subprocess.Popen([sys.executable, worker, jobs], env=one, **words) for one in environments]


def wait(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    """The exit codes; fails, and leaves no process behind, if one does not end in time."""
    deadline = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def together(jobs: list[dict], world: int, folder: Path, seconds: float = 900) -> None:
    """The jobs, each in its folder under `folder`, by so many processes; fails where one of them does not end."""
    file = folder / f"jobs-{len(list(folder.glob('jobs-*.json')))}.json"
    file.write_text(json.dumps([job | {"folder": str(folder / job["folder"])} for job in jobs]))
    with file.with_suffix(".txt").open("w") as output:
        codes = wait(start(file, world, output), seconds)
    assert codes == [0] * world, file.with_suffix(".txt").read_text()[-3000:]


@pytest.fixture(scope="session")
def ranks() -> SimpleNamespace:
    """`ranks.start(jobs, world, output)`, `ranks.wait(processes, seconds)`, and `ranks.together(jobs, world, folder)`,
    which does both."""
    return SimpleNamespace(start=start, wait=wait, together=together)


@pytest.fixture(scope="session")
def whole(toy: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """A run that nothing interrupted: its folder, its weights and its log."""
    folder = tmp_path_factory.mktemp("whole")
    state = toy.train(folder).state_dict()
    return {"folder": folder, "state": state, "lines": toy.lines(folder)}
