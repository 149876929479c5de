"""The processes of a run on this machine, and the supervisors of its others: started, watched, ended together."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field

from zoo.errors import LaunchError, Suspended

from .place import LOST, MARK, ORPHANED

TICK = 0.05  # seconds between two looks at the processes
GRACE = 10.0  # seconds from SIGTERM to SIGKILL
CAUSE = 3.0  # seconds that a rank which has lost another waits for that one's own end to be seen
PATIENCE = 20.0  # seconds of silence after which the first machine is given up
LINK_LOST = 255  # ssh's own exit code
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
logger = logging.getLogger("zoo.training")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to run: `command` once per slot, in folder `cwd`, on machines of so many `slots`; this is `node`."""

    command: list[str]
    cwd: str
    slots: list[int]
    node: int = 0
    master_addr: str
    master_port: int
    environ: dict[str, str] = field(default_factory=dict)  # what other machines are to have in their environment

    def as_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_line(cls, line: bytes) -> Job:
        return cls(**json.loads(line))


@dataclass
class Worker:
    """A process of this machine, or the ssh whose far end is the supervisor of another."""

    name: str
    process: subprocess.Popen
    is_machine: bool = False

    def signal(self, number: int) -> None:
        if self.is_machine:
            self.tell(f"{int(number)}\n")
        else:
            self.process.send_signal(number)  # not to its group: children that load data must live while it saves

    def tell(self, line: str) -> None:
        """A line to the far end; ssh's own end shows when there is none."""
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except (OSError, ValueError):
            pass

    def end(self) -> None:
        """Asks it to end, as one whose run has failed."""
        if not self.is_machine:
            return self.process.terminate()
        try:
            self.process.stdin.close()  # the far end takes this for the end
        except OSError:
            pass

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def free_port() -> int:
    """A port that nobody has now, below those that Linux gives to outgoing connections."""
    start = int.from_bytes(os.urandom(2), "big")
    for step in range(12000):
        port = 20000 + (start + step) % 12000
        try:
            with socket.create_server(("", port)):
                return port
        except OSError:
            continue
    raise LaunchError("no port from 20000 to 31999 is free: give master_port")


def start_workers(job: Job, environ: Mapping[str, str]) -> list[Worker]:
    """Starts the processes of this machine, each with its place in its environment. Raises LaunchError."""
    count, first = job.slots[job.node], sum(job.slots[: job.node])
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    shared = {
        "OMP_NUM_THREADS": str(threads),
        **environ,
        "WORLD_SIZE": str(sum(job.slots)),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": job.master_addr,
        "MASTER_PORT": str(job.master_port),
        MARK: str(os.getpid()),
    }
    die_with_parent, workers = _die_with_parent(), []
    for local in range(count):
        own = {"RANK": str(first + local), "LOCAL_RANK": str(local)}
        try:
            process = subprocess.Popen(
                job.command,
                cwd=job.cwd,
                env=shared | own,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C comes once, through us
                preexec_fn=die_with_parent,
            )
        except OSError as error:
            for worker in workers:
                worker.kill()
            raise LaunchError(f"{job.command[0]} cannot be started on {socket.gethostname()}: {error}") from error
        workers.append(Worker(f"rank {first + local} on {socket.gethostname()}", process))
    return workers


def _die_with_parent() -> Callable[[], None] | None:
    """What a new process calls to be killed with us, which it needs until it has a heartbeat. Linux only."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def call() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:  # it died before
            os._exit(ORPHANED)

    return call


class Supervisor:
    """Waits for all workers; when one fails it says which and why, and ends the others.

    SIGTERM, SIGINT and SIGUSR1 go on to all workers, which may take their time to save; a second SIGTERM or SIGINT
    gives them GRACE seconds. `ear`: a file descriptor on which another supervisor sends a line every second, empty or a
    signal's number; when it closes or falls silent, all ends.
    """

    def __init__(self, workers: list[Worker], ear: int | None = None):
        self.workers, self.running, self.ear = workers, list(workers), ear
        self.failures: list[tuple[Worker, int]] = []
        self.asked: list[int] = []  # signals that were passed on
        self.waiting: list[int] = []  # signals that were not yet
        self.codes: set[int] = set()
        self.suspect_since = self.kill_at = self.ended = None
        self.heard = self.told = time.monotonic()
        self.rest = b""

    def wait(self) -> int:
        """-> the exit code of the run: that of the worker that failed first, Suspended.CODE if they left to go on."""
        before = {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, self._receive) for number in FORWARDED}
        if self.ear is not None:
            os.set_blocking(self.ear, False)
        try:
            while self.running:
                self._look()
                time.sleep(TICK)
        finally:
            for worker in self.running:
                worker.kill()
            for number, handler in before.items():
                signal.signal(number, handler)
        return self._code()

    def _receive(self, number: int, frame: object) -> None:
        self.waiting.append(number)

    def _look(self) -> None:
        now = time.monotonic()
        for worker in list(self.running):
            code = worker.process.poll()
            if code is not None:
                self.running.remove(worker)
                self._ended(worker, code)
        if self.ear is not None and self.ended is None:
            self._hear(now)
        while self.waiting:
            self._pass_on(self.waiting.pop(0))
        if self.suspect_since and now - self.suspect_since > CAUSE and self.ended is None:
            self._fail(*self.failures[0])
        if now - self.told >= 1:
            self.told = now
            for worker in self.running:
                if worker.is_machine:
                    worker.tell("\n")
        if self.kill_at and now >= self.kill_at:
            for worker in self.running:
                if not worker.is_machine or now >= self.kill_at + GRACE / 2:
                    worker.kill()

    def _ended(self, worker: Worker, code: int) -> None:
        self.codes.add(code)
        if code in (0, Suspended.CODE) or abs(code) in self.asked or code - 128 in self.asked:
            return
        if self.ended is not None and not worker.is_machine:  # by our own SIGTERM or SIGKILL
            return
        self.failures.append((worker, code))
        if not worker.is_machine:
            worker.kill()  # what it has left behind
        if code == LOST:
            self.suspect_since = self.suspect_since or time.monotonic()
        else:
            self._fail(worker, code)

    def _fail(self, worker: Worker, code: int) -> None:
        if self.ended is None:
            logger.critical("%s %s: ending the others", worker.name, _in_words(code, worker.is_machine))
            self._end(worker.name)

    def _end(self, why: str) -> None:
        self.ended = why
        self.kill_at = self.kill_at or time.monotonic() + GRACE
        for worker in self.running:
            worker.end()

    def _pass_on(self, number: int) -> None:
        if number != signal.SIGUSR1 and any(before != signal.SIGUSR1 for before in self.asked):
            self.kill_at = self.kill_at or time.monotonic() + GRACE
        self.asked.append(number)
        for worker in self.running:
            worker.signal(number)

    def _hear(self, now: float) -> None:
        try:
            data = os.read(self.ear, 4096)
        except BlockingIOError:
            if now - self.heard > PATIENCE:
                logger.critical("%s: nothing heard from the first machine for %g s", socket.gethostname(), PATIENCE)
                self._end("silence")
            return
        if not data:
            return self._end("the first machine has ended the run")
        self.heard = now
        *lines, self.rest = (self.rest + data).split(b"\n")
        self.waiting += [int(line) for line in lines if line]

    def _code(self) -> int:
        """A rank that lost another is blamed only if nobody else has failed."""
        codes = [code for _, code in self.failures]
        if codes:
            code = next((code for code in codes if code != LOST), LOST)
            return 128 - code if code < 0 else code
        if Suspended.CODE in self.codes:
            return Suspended.CODE
        if self.ended is not None:
            return LOST
        return next((128 - code if code < 0 else code for code in self.codes if code), 0)


def _in_words(code: int, is_machine: bool) -> str:
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    if is_machine and code == LINK_LOST:
        return f"is lost: the link is down, or ssh failed (exit code {code})"
    if is_machine and code > 128:
        return f"ended with exit code {code}, that of a process killed by {signal.Signals(code - 128).name}"
    return f"ended with exit code {code}"
