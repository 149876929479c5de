"""Several machines: two hosts made of namespaces on this one, each with an sshd; and ssh to this very machine.

Nothing outside the test's folder is touched but two network namespaces, and their files in /etc/netns, which go again.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from zoo.training.workers import free_port

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PROGRAMS = ("sshd", "ssh-keygen", "pdsh", "ip", "unshare")
SEARCH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # sbin is not on every root's path
MISSING = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
pytestmark = [
    pytest.mark.multinode,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
]

# Adds up the ranks over all processes, some times; takes DeepSpeed's own argument.
ADDS = """
import os, socket, sys, time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
for turn in range(int(words[1])):
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    if turn == 0:
        line = f"rank {dist.get_rank()} on {socket.gethostname()} adds {total.item():g}"
        sys.stdout.write(line + "\\n")
        sys.stdout.flush()
    time.sleep(0.1)
dist.barrier()
dist.destroy_process_group()
"""


class Keys:
    """Keys, known hosts and an `ssh` that uses them and nothing else, in a folder of their own."""

    def __init__(self, folder: Path, hosts: dict[str, str], port: int):
        self.folder, self.port = folder, port
        for name in ("user", "host"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        shutil.copy(folder / "user.pub", folder / "authorized")
        kind, key = (folder / "host.pub").read_text().split()[:2]
        form = "{}" if port == 22 else f"[{{}}]:{port}"
        names = [",".join(map(form.format, pair)) for pair in hosts.items()]
        (folder / "known").write_text("".join(f"{name} {kind} {key}\n" for name in names))
        (folder / "config").write_text(
            f"Host *\n Port {port}\n IdentityFile {folder}/user\n IdentitiesOnly yes\n LogLevel ERROR\n BatchMode yes\n"
            f" UserKnownHostsFile {folder}/known\n GlobalKnownHostsFile /dev/null\n StrictHostKeyChecking yes\n"
        )
        (folder / "bin").mkdir()
        program = shutil.which("ssh")
        (folder / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {program} -F {folder}/config "$@"\n')
        (folder / "bin" / "ssh").chmod(0o755)
        self.path = f"{folder}/bin:{BIN}:{SEARCH}"

    def sshd(self, address: str) -> list[str]:
        """The command of a server that admits our key and no other."""
        file = self.folder / f"sshd-{address}"
        file.write_text(
            f"Port {self.port}\nListenAddress {address}\nHostKey {self.folder}/host\nPidFile none\nPrintMotd no\n"
            f"AuthorizedKeysFile {self.folder}/authorized\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n"
            f"SetEnv PATH={self.path}\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd asks for it
        return [shutil.which("sshd", path=SEARCH), "-D", "-e", "-f", str(file)]


def finish(command: list, within: float, **more: object) -> tuple[int, str]:
    """Runs in a session of its own, which is ended with it -> exit code, and all it said."""
    begun = begin(command, **more)
    return end(begun, within)


def begin(command: list, **more: object) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    return subprocess.Popen(command, text=True, start_new_session=True, **pipes, **more)


def end(process: subprocess.Popen, within: float) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=within)
        return process.returncode, said
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        pytest.fail(f"not ended after {within} s:\n{said}")


def wait_for(condition, within: float, what: str) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {within} s"
        time.sleep(0.1)


# --- DeepSpeed's own command on one machine, over ssh to localhost ---------------------------------------------------
@pytest.fixture(scope="module")
def localhost(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which `ssh localhost` works: an sshd of our own, on a free port."""
    folder = tmp_path_factory.mktemp("localhost")
    keys = Keys(folder, {"localhost": "127.0.0.1"}, free_port())
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(keys.sshd("127.0.0.1"), stderr=log, start_new_session=True)
    environ = os.environ | {"PATH": keys.path, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    try:
        wait_for(lambda: finish(["ssh", "localhost", "true"], 10, env=environ)[0] == 0, 10, "sshd")
        yield environ
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def test_deepspeed_with_the_repositorys_hostfile(localhost: dict[str, str], tmp_path: Path):
    (tmp_path / "adds.py").write_text(ADDS)
    command = ["deepspeed", "--hostfile", "hostfile", str(tmp_path / "adds.py"), "--turns", "1"]
    code, said = finish(command, 90, cwd=ROOT, env=localhost)
    assert code == 0, said
    assert "rank 0 on" in said and "rank 1 on" in said and said.count("adds 3") == 2


TRAINING = ("--env-type", "deepspeed", "--steps", "2", "--batch-size", "8", "--distort", "0", "--log-interval", "1")


def loss(folder: Path) -> float:
    """The last one of a run of two processes, once it has left its weights."""
    assert (folder / "model.safetensors").exists()
    assert json.loads((folder / "settings.json").read_text())["world_size"] == 2
    return json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["loss"]


def test_the_example_is_trained_alike_by_deepspeeds_launcher_and_by_ours(localhost: dict[str, str], tmp_path: Path):
    losses = []
    for name, launcher in (("theirs", "deepspeed"), ("ours", "zoo launch")):
        words = [*launcher.split(), "--hostfile", "hostfile", "examples/train_clip.py", *TRAINING]
        code, said = finish([*words, "--run-folder", str(tmp_path / name)], 240, cwd=ROOT, env=localhost)
        assert code == 0, said
        losses.append(loss(tmp_path / name))
    assert losses[0] == losses[1]


# --- two machines ----------------------------------------------------------------------------------------------------
ADDRESSES = {"node1": "10.77.0.1", "node2": "10.77.0.2"}
DEAD = {"node3": "10.77.0.3"}


class Machines:
    """Two hosts: each has its own network, names, processes and sshd, and shares the files."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.keys = Keys(folder, ADDRESSES, 22)
        self.spaces = {name: f"zoo-{os.getpid()}-{name}" for name in ADDRESSES}
        self.servers: list[subprocess.Popen] = []

    def up(self) -> None:
        names = [f"{address} {name}\n" for name, address in {**ADDRESSES, **DEAD}.items()]
        for space in self.spaces.values():
            Path("/etc/netns", space).mkdir(parents=True)
            Path("/etc/netns", space, "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
            self.ip("netns", "add", space)
            self.ip("-n", space, "link", "set", "lo", "up")
        one, two = self.spaces.values()
        self.ip("link", "add", "pair", "netns", one, "type", "veth", "peer", "name", "pair", "netns", two)
        for name, space in self.spaces.items():
            self.ip("-n", space, "addr", "add", f"{ADDRESSES[name]}/24", "dev", "pair")
            self.ip("-n", space, "link", "set", "pair", "up")
            serve = f"hostname {name} && exec {shlex.join(self.keys.sshd(ADDRESSES[name]))}"
            inside = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", serve]
            with (self.folder / f"{name}.log").open("w") as log:
                command = ["ip", "netns", "exec", space, *inside]
                self.servers.append(subprocess.Popen(command, stderr=log, start_new_session=True))
        for name in ADDRESSES:
            wait_for(lambda name=name: self.run(name, "true", 10)[0] == 0, 10, name)

    def down(self) -> None:
        for server in self.servers:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        for space in self.spaces.values():
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
            shutil.rmtree(Path("/etc/netns", space), ignore_errors=True)

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    def link(self, state: str) -> None:
        """Pulls node2's plug, or puts it back."""
        self.ip("-n", self.spaces["node2"], "link", "set", "pair", state)

    def command(self, name: str, line: str) -> list[str]:
        """What runs a line on that host, as somebody who logs in there."""
        environ = "DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=pair"
        words = [f"{self.folder}/bin/ssh", name, f"cd {ROOT} && export {environ} && {line}"]
        return ["ip", "netns", "exec", self.spaces[name], *words]

    def run(self, name: str, line: str, within: float) -> tuple[int, str]:
        return finish(self.command(name, line), within)

    def left(self, name: str) -> str:
        """The processes of our script on that host."""
        return self.run(name, "pgrep -fl '[a]dds.py' || true", 10)[1]


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    machines = Machines(tmp_path_factory.mktemp("machines"))
    (machines.folder / "adds.py").write_text(ADDS)
    (machines.folder / "hostfile").write_text("node1 slots=1\nnode2 slots=2\n")
    try:
        machines.up()
        yield machines
    finally:
        machines.down()


def zoo_launch(machines: Machines, turns: int, hostfile: str = "hostfile") -> str:
    return f"exec zoo launch --hostfile {machines.folder}/{hostfile} {machines.folder}/adds.py --turns {turns}"


def test_zoo_launch_over_two_machines(machines: Machines):
    code, said = machines.run("node1", zoo_launch(machines, 1), 60)
    assert code == 0, said
    lines = sorted(line for line in said.splitlines() if line.startswith("rank"))
    assert lines == ["rank 0 on node1 adds 6", "rank 1 on node2 adds 6", "rank 2 on node2 adds 6"]


def test_deepspeed_over_two_machines(machines: Machines):
    (machines.folder / "ds_env").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\nGLOO_SOCKET_IFNAME=pair\n")
    options = f"--hostfile {machines.folder}/hostfile --master_port {free_port()}"
    line = f"DS_ENV_FILE={machines.folder}/ds_env exec deepspeed {options} {machines.folder}/adds.py --turns 1"
    code, said = machines.run("node1", line, 120)
    assert code == 0, said
    for rank, name in enumerate(("node1", "node2", "node2")):
        assert f"rank {rank} on {name} adds 6" in said


def test_a_machine_that_cannot_be_reached_is_named_before_anything_starts(machines: Machines):
    (machines.folder / "dead").write_text("node1 slots=1\nnode3 slots=1\n")
    code, said = machines.run("node1", zoo_launch(machines, 1, "dead"), 30)
    assert code == 2 and "cannot start on node3 (ssh: connect to host node3 port 22" in said and "rank" not in said


def test_a_killed_launcher_leaves_nobody_on_either_machine(machines: Machines):
    process = begin(machines.command("node1", zoo_launch(machines, 10000)))
    try:
        wait_for(lambda: machines.left("node2").count("python") >= 2, 40, "ranks on node2")
        machines.run("node1", "pkill -KILL -f 'zoo [l]aunch'", 10)
        wait_for(lambda: not machines.left("node1") and not machines.left("node2"), 10, "end of all ranks")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_link_that_drops_ends_the_run_on_both_machines_and_names_the_other(machines: Machines):
    process = begin(machines.command("node1", zoo_launch(machines, 10000)))
    try:
        wait_for(lambda: "adds 6" in process.stdout.readline(), 40, "the first sum")
        machines.link("down")
        begun = time.monotonic()
        code, said = end(process, 40)
        assert code != 0 and "machine node2 is lost: the link is down" in said
        assert time.monotonic() - begun < 30
        wait_for(lambda: not machines.left("node1"), 5, "end of the ranks on node1")
    finally:
        machines.link("up")
        process.kill()
        process.wait()
    wait_for(lambda: not machines.left("node2"), 40, "end of the ranks on node2")
