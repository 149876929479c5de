"""One command, many processes: whether a launcher started this one, and the start of its own workers if none did."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import HostfileError, LaunchError, SettingsError

from .hostfile import Host, is_loopback, is_this_machine, read_hostfile
from .place import Place, place_in
from .remote import check_machines, own_address, passed_on, start_supervisors
from .workers import Job, Supervisor, free_port, start_workers

if TYPE_CHECKING:
    from .settings import Settings

logger = logging.getLogger("zoo.training")


def find_place() -> Place | None:
    """Where the launcher has put this process, None if it stands alone. Raises LaunchError if that is unclear."""
    return place_in(os.environ)


def relaunch(settings: Settings) -> None:
    """Runs this very command as the processes that the settings ask for, and leaves with their exit code (SystemExit).

    Returns at once in a process that a launcher started, and where no more than this one is asked for. Raises
    SettingsError, LaunchError.
    """
    check_accelerate()
    place = find_place()
    check_deepspeed(place)
    several = (settings.num_gpus or 1) > 1 or settings.num_nodes > 1
    if place is None and (several or settings.hostfile is not None):
        raise SystemExit(
            start(
                this_command(),
                hostfile=settings.hostfile,
                num_gpus=settings.num_gpus,
                num_nodes=settings.num_nodes if settings.num_nodes > 1 else None,
                master_addr=settings.master_ip,
                master_port=settings.master_port,
            )
        )
    if place is not None and place.world_size == 1 and several:
        logger.warning(
            "num_gpus=%s, num_nodes=%s, but %s started one process only, and that holds",
            *(settings.num_gpus, settings.num_nodes, place.launcher),
        )


def this_command() -> list[str]:
    """The command that started this process, as it was: interpreter, its options, script or module, arguments.

    Raises SettingsError in a notebook or a prompt.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    if "-c" not in sys.orig_argv[:-1] and not (script and Path(script).exists()):
        raise SettingsError(
            "num_gpus, num_nodes and hostfile start the script again in each process, and here is none: save this as "
            "a script, or leave them out and train in this one process"
        )
    return [sys.executable, *sys.orig_argv[1:]]


def check_accelerate() -> None:
    """Raises SettingsError where `accelerate launch --cpu --num_processes 2` was to start two and started one."""
    # For several processes it always sets MASTER_PORT, also when it then starts one without a RANK.
    if "RANK" in os.environ or not {"ACCELERATE_MIXED_PRECISION", "MASTER_PORT"} <= os.environ.keys():
        return
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text().replace("_", "-").replace("=", "\0").split("\0")
        if words[words.index("--num-processes") + 1] == "1":
            return  # MASTER_PORT is of other origin
    except (OSError, ValueError, IndexError):
        pass
    raise SettingsError(
        "accelerate was to start several processes and started one, without telling: use `accelerate launch "
        "--multi_gpu --num_processes N` (on CPUs too, without --cpu), torchrun, or num_gpus=N"
    )


def check_deepspeed(place: Place | None) -> None:
    """Raises HostfileError where `deepspeed --hostfile F` found no F, said so in passing, and started one process."""
    if place is None or place.launcher != "deepspeed" or place.world_size > 1:
        return
    try:
        words = Path(f"/proc/{parent_of(os.getppid())}/cmdline").read_text().replace("=", "\0").split("\0")
        named = next(words[i + 1] for i, word in enumerate(words) if word in ("--hostfile", "-H"))
    except (OSError, StopIteration, IndexError):
        return
    if not Path(named).is_file():
        raise HostfileError(f"deepspeed --hostfile {named}: there is no such file, so it started one process here")


def parent_of(pid: int) -> int | None:
    """Of another process; None where the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None


def start(
    command: list[str],
    *,
    hostfile: str | Path | None = None,
    num_gpus: int | None = None,
    num_nodes: int | None = None,
    node_rank: int | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
) -> int:
    """Runs the command once per slot of each machine, and waits -> the exit code. Raises SettingsError, LaunchError.

    `num_gpus`: processes on each machine, 1 if neither it nor a hostfile says. `num_nodes`: the first so many machines
    of the hostfile. With `node_rank` nothing is started elsewhere: this is that machine, and others start theirs.
    """
    hosts = find_hosts(hostfile, num_gpus, num_nodes, by_hand=node_rank is not None)
    if node_rank is not None:
        if not 0 <= node_rank < len(hosts):
            raise SettingsError(f"node_rank={node_rank}, but there are {len(hosts)} machines: count them from 0")
        if len(hosts) > 1 and (master_port is None or (hostfile is None and master_addr is None)):
            raise SettingsError(f"node_rank={node_rank}: give master_addr and master_port, the same on every machine")
        here = [node_rank]
    else:
        here = [node for node, host in enumerate(hosts) if is_this_machine(host.address)]
    if len(here) > 1:
        names = " and ".join(repr(hosts[node].name) for node in here)
        raise HostfileError(f"{hostfile}: {names} are both this machine: give each machine one line")
    elsewhere = [(node, hosts[node]) for node in range(len(hosts)) if node not in here and node_rank is None]
    job = Job(
        command=command,
        cwd=os.getcwd(),
        slots=[host.slots for host in hosts],
        node=here[0] if here else 0,
        master_addr=master_addr or _meeting_place(hosts, here),
        master_port=master_port or free_port(),
        environ=passed_on(os.environ) if elsewhere else {},
    )
    if elsewhere:
        check_machines([host for _, host in elsewhere], job)
    workers = start_workers(job, os.environ) if here else []
    return Supervisor([*workers, *start_supervisors(elsewhere, job)]).wait()


def find_hosts(
    hostfile: str | Path | None, num_gpus: int | None, num_nodes: int | None, by_hand: bool = False
) -> list[Host]:
    """The machines and how many processes each runs. Raises SettingsError, HostfileError."""
    if hostfile is None:
        if (num_nodes or 1) > 1 and not by_hand:
            raise SettingsError(
                f"num_nodes={num_nodes} needs a hostfile that names the machines; or run `zoo launch --num-nodes "
                f"{num_nodes} --node-rank K --master-addr A --master-port P` on each"
            )
        return [Host(f"machine-{node}" if by_hand else "localhost", num_gpus or 1) for node in range(num_nodes or 1)]
    hosts = read_hostfile(hostfile)
    if num_nodes is not None and num_nodes > len(hosts):
        raise HostfileError(f"num_nodes={num_nodes}, but {hostfile} names {len(hosts)} machines")
    hosts = hosts[:num_nodes]
    for host in hosts:
        if num_gpus is not None and num_gpus > host.slots:
            raise HostfileError(f"num_gpus={num_gpus}, but {hostfile} gives {host.name} {host.slots} slots")
    return [Host(host.name, num_gpus or host.slots) for host in hosts]


def _meeting_place(hosts: list[Host], here: list[int]) -> str:
    """The address at which every machine finds rank 0."""
    if len(hosts) == 1 and here:
        return "127.0.0.1"
    if 0 in here and is_loopback(hosts[0].address):  # a name that means another machine to each
        return own_address(toward=hosts[1].address)
    return hosts[0].address


def serve() -> int:
    """The supervisor of a machine that another one reached over ssh; see `start_supervisors`."""
    line = b""
    while not line.endswith(b"\n"):  # byte by byte: what follows is for the supervisor
        byte = os.read(0, 1)
        if not byte:
            raise LaunchError("nothing came from the first machine")
        line += byte
    job = Job.from_line(line)
    return Supervisor(start_workers(job, os.environ | job.environ), ear=0).wait()


if __name__ == "__main__":
    sys.exit(serve())
