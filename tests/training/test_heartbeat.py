"""Who loses another rank, or the launcher, says which and ends within seconds; who leaves in peace disturbs nobody."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zoo.errors import LaunchError
from zoo.training.engines.heartbeat import Heartbeat
from zoo.training.place import LOST, ORPHANED, Place

HOST = socket.gethostname()
# A rank without torch. It obeys the words that come on its standard input.
RANK = """
import os, subprocess, sys, time, types
import zoo.training
engines = types.ModuleType("zoo.training.engines")
engines.__path__ = [zoo.training.__path__[0] + "/engines"]
sys.modules[engines.__name__] = engines
from zoo.training.engines.heartbeat import Heartbeat
from zoo.training.place import Place

rank, size, patience, file = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
listener = Heartbeat.listen() if rank == 0 else None
if listener:
    open(file + ".new", "w").write(str(listener.port))
    os.rename(file + ".new", file)
while not os.path.exists(file):
    time.sleep(0.02)
place = Place(rank, size, rank, size, "127.0.0.1", 1, "other")
beat = Heartbeat(place, patience, "127.0.0.1", int(open(file).read()), listener)
beat.start()
print("up", flush=True)
for word in sys.stdin:
    if word == "fork\\n" and os.fork() == 0:
        time.sleep(30)
        os._exit(0)
    if word == "compute\\n":
        sum(range(int(4e7)))  # one call, which lets no other thread run
    print("done", flush=True)
beat.close()
"""


class Ranks:
    """Processes with a heartbeat, in one process group."""

    def __init__(self, folder: Path, size: int, patience: float):
        script = folder / "rank.py"
        script.write_text(RANK)
        self.processes: list[subprocess.Popen] = []
        for rank in range(size):
            words = [sys.executable, script, str(rank), str(size), str(patience), folder / "port"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            group = self.processes[0].pid if self.processes else 0
            self.processes.append(subprocess.Popen(words, text=True, process_group=group, **pipes))
        for process in self.processes:
            assert process.stdout.readline() == "up\n", process.stderr.read()

    def __getitem__(self, rank: int) -> subprocess.Popen:
        return self.processes[rank]

    def tell(self, rank: int, word: str) -> None:
        self[rank].stdin.write(word + "\n")
        self[rank].stdin.flush()
        assert self[rank].stdout.readline() == "done\n"

    def ends(self, rank: int, within: float = 6) -> tuple[int, str]:
        """-> exit code and what it said."""
        code = self[rank].wait(within)
        return code, self[rank].stderr.read()

    def leave(self, rank: int) -> None:
        """In peace: its code is 0 and it has nothing to say."""
        self[rank].stdin.close()
        assert self.ends(rank) == (0, "")


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator:
    started: list[Ranks] = []

    def start(size: int, patience: float = 20) -> Ranks:
        started.append(Ranks(tmp_path, size, patience))
        return started[-1]

    yield start
    for group in started:
        try:
            os.killpg(group[0].pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        for process in group.processes:
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                pipe.close()


@pytest.mark.parametrize("order", [(1, 2, 0), (0, 2, 1)])
def test_ranks_leave_one_after_another(ranks, order: tuple[int, ...]):
    group = ranks(3)
    for rank in order:
        group.leave(rank)
        time.sleep(0.3)


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_rank_ends_all_and_is_named(ranks, dead: int):
    group = ranks(3)
    group[dead].kill()
    for rank in {0, 1, 2} - {dead}:
        code, said = group.ends(rank)
        assert code == LOST
        assert f"rank {rank} on {HOST} ends: rank {dead} on " in said and "died" in said


def test_a_killed_rank_is_missed_though_a_child_of_it_lives(ranks):
    group = ranks(2)
    group.tell(1, "fork")
    group[1].kill()
    assert group.ends(0)[0] == LOST


def test_a_silent_rank_ends_all_and_is_named(ranks):
    group = ranks(3, patience=2)
    group[2].send_signal(signal.SIGSTOP)
    for rank in (0, 1):
        code, said = group.ends(rank, within=8)
        assert code == LOST and "rank 2 on" in said and "silent" in said


def test_a_group_that_is_stopped_and_continued_is_not_silent(ranks):
    group = ranks(2, patience=3)
    os.killpg(group[0].pid, signal.SIGSTOP)
    time.sleep(4)
    os.killpg(group[0].pid, signal.SIGCONT)
    time.sleep(1)
    group.leave(0)
    group.leave(1)


def test_a_long_computation_is_not_silence(ranks):
    group = ranks(2, patience=10)
    group.tell(0, "compute")
    group.leave(1)
    group.leave(0)


def test_a_rank_ends_with_its_launcher(tmp_path: Path):
    script, said = tmp_path / "rank.py", tmp_path / "said"
    script.write_text(RANK)
    launcher = f"""
        import subprocess, sys, time
        words = [sys.executable, {str(script)!r}, "0", "1", "20", {str(tmp_path / "port")!r}]
        rank = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=open({str(said)!r}, "w"))
        rank.stdout.readline()
        print(rank.pid, flush=True)
        time.sleep(60)
    """
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
    }  # the rank shares the input, and is not ended by it
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(launcher)], text=True, **pipes) as process:
        rank = int(process.stdout.readline())
        process.kill()
        assert gone(rank, within=5)
    assert "the launcher was killed" in said.read_text()


def gone(pid: int, within: float) -> bool:
    """Whether the process ends in time."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_rank_whose_launcher_died_before_it_began(tmp_path: Path):
    (tmp_path / "rank.py").write_text(RANK)
    words = [sys.executable, tmp_path / "rank.py", "0", "1", "20", tmp_path / "port"]
    done = subprocess.run(words, env=os.environ | {"ZOO_LAUNCHER": "1"}, capture_output=True, text=True, timeout=20)
    assert done.returncode == ORPHANED and "the launcher was killed" in done.stderr


def place(rank: int, size: int) -> Place:
    return Place(rank, size, rank, size, "127.0.0.1", 1, "other")


def test_a_rank_that_does_not_come_is_named():
    listener = Heartbeat.listen()
    with socket.create_connection(("127.0.0.1", listener.port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n")
        with pytest.raises(LaunchError, match="rank 1, 2: no heartbeat within 0.4 s"):
            Heartbeat(place(0, 3), 0.4, "127.0.0.1", listener.port, listener).start()


def test_a_rank_that_finds_nobody_says_where_it_looked():
    listener = Heartbeat.listen()
    listener.socket.close()
    with pytest.raises(LaunchError, match=f"rank 1 cannot reach rank 0 at 127.0.0.1, port {listener.port}"):
        Heartbeat(place(1, 2), 1, "127.0.0.1", listener.port).start()
