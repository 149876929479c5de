"""How a process becomes one of a run's ranks, on which device it works, and how it leaves."""

from __future__ import annotations

import atexit
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from zoo.devices import find_device
from zoo.distributed import Channel
from zoo.errors import LaunchError, SettingsError

from ..launch import Place, find_place
from ..settings import Settings
from .heartbeat import Heartbeat

MEETING = timedelta(seconds=120)  # for all processes to come, however long a collective may take later
_ALONE = Place(rank=0, world_size=1, local_rank=0, local_world_size=1, master_addr="", master_port=0, launcher="alone")


def place() -> Place:
    """Where this process stands among all; alone if no launcher started it."""
    return find_place() or _ALONE


def local_device(settings: Settings) -> torch.device:
    """The GPU of this process's number on its machine, or the CPU; `pytorch_device` says which kind.

    Raises SettingsError where a machine has fewer GPUs than processes.
    """
    wanted = find_device(settings.pytorch_device)
    if wanted.type != "cuda":
        return wanted
    here = place()
    if here.local_rank >= torch.cuda.device_count():
        raise SettingsError(
            f"{here.local_world_size} processes on a machine of {torch.cuda.device_count()} GPUs: start one for each"
        )
    return torch.device("cuda", here.local_rank)


def join(settings: Settings) -> None:
    """Joins the run's process group, once. Raises SettingsError, LaunchError.

    A collective that waits longer than `settings.timeout` minutes fails: in DeepSpeed's own groups too, which take
    torch's default and ignore the group's (reference: torch.distributed.distributed_c10d.default_pg_timeout).
    """
    if dist.is_initialized():
        return
    here, limit = place(), timedelta(minutes=settings.timeout)
    dist.distributed_c10d.default_pg_timeout = limit
    device = local_device(settings)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    if here.world_size == 1:
        # DeepSpeed asks for it. RANK and WORLD_SIZE would say that a launcher started this process.
        os.environ.setdefault("LOCAL_RANK", str(here.local_rank))
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=limit)
        return
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:  # processes would fight for the cores
        torch.set_num_threads(max(1, torch.get_num_threads() // here.local_world_size))
    # DeepSpeed reads these itself, also where Slurm's variables said them.
    os.environ |= {
        "RANK": str(here.rank),
        "WORLD_SIZE": str(here.world_size),
        "LOCAL_RANK": str(here.local_rank),
        "MASTER_ADDR": here.master_addr,
        "MASTER_PORT": str(here.master_port),
    }
    try:
        store, *_ = next(dist.rendezvous("env://", here.rank, here.world_size, timeout=MEETING))
    except dist.DistError as error:
        raise LaunchError(
            f"rank {here.rank} waited {MEETING} at {here.master_addr}:{here.master_port} and not all of "
            f"{here.world_size} processes came: {error}. Look whether each machine is up and reaches that one"
        ) from error
    store.set_timeout(limit)
    dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.world_size, timeout=limit)
    atexit.register(_leave, _start_heartbeat(here, settings.heartbeat) if settings.heartbeat else None)


def _start_heartbeat(here: Place, patience: float) -> Heartbeat:
    channel = Channel()
    listener = Heartbeat.listen() if here.rank == 0 else None
    port = channel.exchange(listener.port if listener else None)[0]
    beat = Heartbeat(here, patience, here.master_addr, port, listener)
    beat.start()
    return beat


def _leave(beat: Heartbeat | None) -> None:
    failed = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    if isinstance(failed, KeyboardInterrupt):  # all have saved and leave together
        failed = None
    if beat is not None and not failed:  # whoever fails says no goodbye, so that the others know
        beat.close()
    if dist.is_initialized() and not failed:
        dist.destroy_process_group()
