"""Where a process stands among those of its run, as the variables of its launcher say it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from zoo.errors import LaunchError

MARK = "ZOO_LAUNCHER"  # set for the processes that we start: the process id of who did
LOST, ORPHANED = 70, 71  # exit codes of a process that has lost another rank, or its launcher

# The variable that only this launcher sets, the outermost first: accelerate starts torchrun.
_MARKS = {
    MARK: "zoo",
    "ACCELERATE_MIXED_PRECISION": "accelerate",
    "CROSS_SIZE": "deepspeed",
    "TORCHELASTIC_RUN_ID": "torchrun",
}
_MISSING = "start it with `zoo launch`, torchrun or deepspeed, which set them all, or unset what is left of another run"


@dataclass(frozen=True)
class Place:
    """One process among `world_size`, and among `local_world_size` on its machine; where rank 0 is to be met.

    `launcher`: "zoo", "torchrun", "deepspeed", "accelerate", "slurm", or "other".
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str


def place_in(environ: Mapping[str, str]) -> Place | None:
    """The place that a launcher's or Slurm's variables give; None for one that stands alone. Raises LaunchError."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        place = _launched(environ)
    elif "SLURM_PROCID" in environ and "SLURM_STEP_ID" in environ:  # a batch script has the first, its own tasks both
        place = _slurm(environ)
    else:
        return None
    if place and not (place.rank < place.world_size and place.local_rank < place.local_world_size):
        raise LaunchError(
            f"rank {place.rank} of {place.world_size}, local rank {place.local_rank} of {place.local_world_size}: "
            f"the launcher's variables contradict each other; {_MISSING}"
        )
    return place


def _number(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environ.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        known = [n for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID") if n in environ]
        raise LaunchError(f"{name} is not set, but {', '.join(known)} is: {_MISSING}")
    if not (value.isascii() and value.isdigit()):
        raise LaunchError(f"{name}={value!r} is no number: {_MISSING}")
    return int(value)


def _launched(environ: Mapping[str, str]) -> Place:
    rank, size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    # LOCAL_SIZE is DeepSpeed's. A launcher that says neither runs one process on each machine.
    local_rank = _number(environ, "LOCAL_RANK", 0)
    local_size = _number(environ, "LOCAL_WORLD_SIZE", _number(environ, "LOCAL_SIZE", 0))
    alone = size == 1
    address = environ.get("MASTER_ADDR", "127.0.0.1" if alone else "")
    if not address:
        raise LaunchError(f"MASTER_ADDR is not set, but RANK and WORLD_SIZE={size} are: {_MISSING}")
    return Place(
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        local_world_size=local_size or (size if "LOCAL_RANK" in environ else 1),
        master_addr=address,
        master_port=_number(environ, "MASTER_PORT", 0 if alone else None),
        launcher=next((launcher for mark, launcher in _MARKS.items() if mark in environ), "other"),
    )


# --- Slurm -----------------------------------------------------------------------------------------------------------
def _slurm(environ: Mapping[str, str]) -> Place | None:
    """The place of one of the several tasks that srun started."""
    size = _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1))
    if size == 1:
        return None
    machines = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if not machines:
        raise LaunchError("SLURM_JOB_NODELIST is not set, but SLURM_PROCID is: start the script with srun")
    counts = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    counts = counts or environ.get("SLURM_NTASKS_PER_NODE", str(size))
    job, step = _number(environ, "SLURM_JOB_ID", 0), _number(environ, "SLURM_STEP_ID", 0)
    return Place(
        rank=_number(environ, "SLURM_PROCID"),
        world_size=size,
        local_rank=_number(environ, "SLURM_LOCALID"),
        local_world_size=_tasks_on(counts, _number(environ, "SLURM_NODEID", 0)),
        master_addr=environ.get("MASTER_ADDR") or first_machine(machines),
        master_port=_number(environ, "MASTER_PORT", 20000 + (31 * job + step) % 12000),  # the same for every task
        launcher="slurm",
    )


def _tasks_on(counts: str, machine: int) -> int:
    """Slurm's `4(x2),3` -> the tasks of a machine: 4, 4 and 3."""
    tasks: list[int] = []
    for part in counts.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not found:
            raise LaunchError(f"SLURM_TASKS_PER_NODE={counts!r} cannot be read: start with torchrun or zoo launch")
        tasks += [int(found[1])] * int(found[2] or 1)
    return tasks[min(machine, len(tasks) - 1)]


def first_machine(names: str) -> str:
    """Slurm's list of machines -> the first: `node[003-005,9],login` -> node003."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", names.strip())
    if not first:
        raise LaunchError(f"SLURM_JOB_NODELIST={names!r} cannot be read: start with torchrun or zoo launch")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])
