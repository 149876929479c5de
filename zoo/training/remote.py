"""Other machines over ssh: whether they can be reached, and a supervisor on each."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace

from zoo.errors import LaunchError

from .hostfile import Host
from .workers import Job, Worker

DEADLINE = 20.0  # seconds for a machine to answer
_OPTIONS = ("BatchMode=yes", "ConnectTimeout=5", "ServerAliveInterval=5", "ServerAliveCountMax=2")
_SSH = ["ssh", *(word for option in _OPTIONS for word in ("-o", option))]
# What other machines get of this one's environment; the rest, such as HOME, is their own.
_PASSED_ON = (
    *("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "PYTHON", "OMP_", "MKL_", "KMP_", "TOKENIZERS_", "TORCH", "CUDA_"),
    *("NCCL_", "GLOO_", "UCX_", "FI_", "DS_", "ZOO_", "HF_", "WANDB_", "LC_", "LANG"),
)
_OWN = ("CUDA_VISIBLE_DEVICES",)


def passed_on(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that the processes on other machines need."""
    return {name: value for name, value in environ.items() if name.startswith(_PASSED_ON) and name not in _OWN}


def check_machines(hosts: list[Host], job: Job) -> None:
    """Asks all at once whether they answer and have the folder and zoo. Raises LaunchError naming those that do not."""
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    asked = [_open(host, job, "-c 'import zoo.training.launch'", **streams) for host in hosts]
    faults, deadline = [], time.monotonic() + DEADLINE
    for host, process in zip(hosts, asked, strict=True):
        try:
            _, said = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said = f"{process.communicate()[1]}\nno answer within {DEADLINE:g} s"
        if process.returncode != 0:
            last = (said.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            faults.append(f"{host.name} ({last})")
    if faults:
        raise LaunchError(
            f"cannot start on {', '.join(faults)}: `ssh {hosts[0].name}` must work without a password, and "
            f"{job.cwd} and {sys.executable} be there as here"
        )


def start_supervisors(hosts: list[tuple[int, Host]], job: Job) -> list[Worker]:
    """A supervisor on each machine, given with its number.

    Its standard input tells it the job, then signals and signs of life, and by closing that all is over.
    """
    workers = []
    for node, host in hosts:
        process = _open(host, job, "-m zoo.training.launch")
        worker = Worker(f"machine {host.name}", process, is_machine=True)
        worker.tell(replace(job, node=node).as_line())
        workers.append(worker)
    return workers


def _open(host: Host, job: Job, command: str, **streams: int) -> subprocess.Popen:
    path = job.environ.get("PYTHONPATH")
    python = f"{'env PYTHONPATH=' + shlex.quote(path) + ' ' if path else ''}{shlex.quote(sys.executable)} {command}"
    words = [*_SSH, host.name, f"cd {shlex.quote(job.cwd)} && exec {python}"]
    try:
        return subprocess.Popen(words, stdin=subprocess.PIPE, text=True, start_new_session=True, **streams)
    except OSError as error:
        raise LaunchError(f"ssh cannot be started ({error}): install it to run on other machines") from error


def own_address(toward: str) -> str:
    """This machine's address as another one sees it. Raises LaunchError."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(toward, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            return probe.getsockname()[0]
    except OSError as error:
        raise LaunchError(f"no way from here to {toward} ({error}): give master_ip, this machine's address") from error
