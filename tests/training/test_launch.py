"""A command becomes several processes, ends as they end, and leaves none behind, on this machine and over ssh."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from zoo import weights
from zoo.cli import main
from zoo.errors import HostfileError, LaunchError, SettingsError
from zoo.training import launch, workers
from zoo.training.place import LOST

ROOT = Path(__file__).parents[2]
HOST = socket.gethostname()
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "ZOO_LAUNCHER")

# What a rank does. It leaves a file that says who it is, then does as the word says.
RANK = """
import json, os, signal, subprocess, sys, time
folder, word, *rest = sys.argv[1:]
rank = int(os.environ["RANK"])

def suspend(number, frame):
    sys.exit(75)

if word == "suspend":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, suspend)
if word == "stubborn" and rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
about = {"pid": os.getpid(), "args": rest, "environ": dict(os.environ), "cwd": os.getcwd()}
with open(f"{folder}/{rank}.new", "w") as file:
    json.dump(about, file)
os.rename(f"{folder}/{rank}.new", f"{folder}/{rank}.json")
last = rank == int(os.environ["WORLD_SIZE"]) - 1
if word in ("fail", "stubborn", "lost") and last:
    time.sleep(0.3)
    sys.exit(7)
if word == "kill" and last:
    os.kill(os.getpid(), signal.SIGKILL)
if word == "lost":
    sys.exit(70)
if word != "end":
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch):
    """No launcher's variables, whatever runs the tests."""
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def script(tmp_path: Path) -> list[str]:
    (tmp_path / "rank.py").write_text(RANK)
    (tmp_path / "said").mkdir()
    return [sys.executable, str(tmp_path / "rank.py"), str(tmp_path / "said")]


def ranks(script: list[str], count: int, within: float = 20) -> list[dict]:
    """What the ranks have left, once all have."""
    paths = [Path(script[2], f"{rank}.json") for rank in range(count)]
    wait_for(lambda: all(path.exists() for path in paths), within)
    return [json.loads(path.read_text()) for path in paths]


def wait_for(condition, within: float) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def zoo_launch(script: list[str]) -> Iterator:
    """Starts `zoo launch` beside the test, which ends with it."""
    started: list[subprocess.Popen] = []

    def begin(*words: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "zoo.cli", "launch", *words]
        started.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


# --- one machine -----------------------------------------------------------------------------------------------------
def test_each_process_has_its_place_the_arguments_and_its_share_of_the_cores(script: list[str]):
    assert launch.start([*script, "end", "--a", "b c", "*"], num_gpus=2) == 0
    for rank, about in enumerate(ranks(script, 2)):
        environ = about["environ"]
        assert about["args"] == ["--a", "b c", "*"] and about["cwd"] == os.getcwd()
        assert (environ["RANK"], environ["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (environ["WORLD_SIZE"], environ["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert environ["MASTER_ADDR"] == "127.0.0.1" and 20000 <= int(environ["MASTER_PORT"]) < 32000
        assert environ["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
        assert environ["ZOO_LAUNCHER"] == str(os.getpid())


def test_what_is_set_stays(script: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert launch.start([*script, "end"], num_gpus=1, master_port=31999) == 0
    (about,) = ranks(script, 1)
    assert [about["environ"][name] for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")] == ["7", "1,0"]
    assert about["environ"]["MASTER_PORT"] == "31999"


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", HOST])
def test_a_hostfile_of_this_machine_needs_no_ssh(script, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no ssh on it
    (tmp_path / "hostfile").write_text(f"{name} slots=2\n")
    assert launch.start([*script, "end"], hostfile=tmp_path / "hostfile") == 0
    assert len(ranks(script, 2)) == 2


@pytest.mark.parametrize(
    ("word", "code", "why"), [("fail", 7, "ended with exit code 7"), ("kill", 137, "was killed by SIGKILL")]
)
def test_a_rank_that_fails_is_named_and_ends_the_others(script, word: str, code: int, why: str, caplog):
    start = time.monotonic()
    assert launch.start([*script, word], num_gpus=3) == code
    assert f"rank 2 on {HOST} {why}" in caplog.text
    assert time.monotonic() - start < workers.GRACE
    assert not any(alive(about["pid"]) for about in ranks(script, 3))


def test_a_rank_that_does_not_end_is_killed(script: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "GRACE", 0.5)
    begun = time.monotonic()
    assert launch.start([*script, "stubborn"], num_gpus=2) == 7
    assert time.monotonic() - begun < 15
    assert not any(alive(about["pid"]) for about in ranks(script, 2))


def test_the_rank_that_failed_is_blamed_not_those_that_lost_it(script: list[str], caplog):
    assert launch.start([*script, "lost"], num_gpus=2) == 7
    assert f"rank 1 on {HOST} ended with exit code 7" in caplog.text and f"exit code {LOST}" not in caplog.text


def test_a_rank_that_lost_an_unknown_one_ends_all(script: list[str], caplog, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "CAUSE", 0.3)
    command = [
        sys.executable,
        "-c",
        "import os, sys, time; sys.exit(70) if os.environ['RANK'] == '0' else time.sleep(60)",
    ]
    assert launch.start(command, num_gpus=2) == LOST
    assert f"rank 0 on {HOST} ended with exit code {LOST}" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_rank_and_the_code_says_suspended(script, zoo_launch, number: signal.Signals):
    process = zoo_launch("--num-gpus", "2", *script[1:], "suspend")
    ranks(script, 2)
    process.send_signal(number)
    assert process.wait(10) == 75
    assert process.stderr.read() == ""


def test_a_signal_that_the_ranks_do_not_handle_is_the_exit_code(script: list[str], zoo_launch):
    process = zoo_launch("--num-gpus", "2", *script[1:], "sleep")
    ranks(script, 2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 128 + signal.SIGTERM
    assert process.stderr.read() == ""


def test_ranks_that_save_are_waited_for_until_a_second_signal(script: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "GRACE", 0.5)
    saving = (
        "import os, signal, time; signal.signal(15, signal.SIG_IGN); signal.signal(2, signal.SIG_IGN); time.sleep(60)"
    )
    job = workers.Job(
        command=[sys.executable, "-c", saving], cwd=".", slots=[1], master_addr="127.0.0.1", master_port=1
    )
    supervisor = workers.Supervisor(workers.start_workers(job, {}))
    time.sleep(0.3)  # until it ignores them
    begun = time.monotonic()
    supervisor._receive(signal.SIGTERM, None)
    while time.monotonic() - begun < 1.5:
        supervisor._look()
    assert supervisor.running
    supervisor._receive(signal.SIGTERM, None)
    assert supervisor.wait() == 128 + signal.SIGKILL


def test_no_rank_outlives_a_killed_launcher(script: list[str], zoo_launch):
    process = zoo_launch("--num-gpus", "2", *script[1:], "sleep")
    started = ranks(script, 2)
    process.kill()
    wait_for(lambda: not any(alive(about["pid"]) for about in started), 5)


def test_a_command_that_is_not_there_is_an_error():
    with pytest.raises(LaunchError, match="/not/there cannot be started"):
        launch.start(["/not/there"], num_gpus=2)


def test_machines_started_by_hand_take_their_number_and_the_same_meeting_place(script: list[str]):
    words = {"num_gpus": 1, "num_nodes": 2, "master_addr": "10.0.0.1", "master_port": 29500}
    for node in (0, 1):
        assert launch.start([*script, "end"], node_rank=node, **words) == 0
    for rank, about in enumerate(ranks(script, 2)):
        environ = about["environ"]
        assert (environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"]) == (str(rank), "0", "2")
        assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "29500")
    with pytest.raises(SettingsError, match="node_rank=2, but there are 2 machines"):
        launch.start(script, node_rank=2, **words)
    with pytest.raises(SettingsError, match="give master_addr and master_port"):
        launch.start(script, node_rank=1, num_nodes=2)


# --- several machines, behind an ssh of ours that runs the command here ----------------------------------------------
SSH = """#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
case $1 in
    *down*) echo "ssh: connect to host $1 port 22: No route to host" >&2; exit 255;;
    *slow*) exec sleep 60;;
esac
shift
sh -c "$1"
"""


@pytest.fixture
def two_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hostfile; its names are unknown here, and our ssh, first on PATH, reaches them."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.parent.mkdir()
    ssh.write_text(SSH)
    ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{ssh.parent}:{os.environ['PATH']}")
    path = tmp_path / "hostfile"
    path.write_text("node1.invalid slots=1\nnode2.invalid slots=2\n")
    return path


def test_ranks_are_counted_over_the_machines(script: list[str], two_machines: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NCCL_DEBUG", 'it\'s "so"; $HOME')
    monkeypatch.setenv("SECRET", "x")
    assert launch.start([*script, "end", "it's; *"], hostfile=two_machines) == 0
    places = [("0", "0", "1"), ("1", "0", "2"), ("2", "1", "2")]
    for about, place in zip(ranks(script, 3), places, strict=True):
        environ = about["environ"]
        assert tuple(environ[name] for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")) == place
        assert environ["WORLD_SIZE"] == "3" and environ["MASTER_ADDR"] == "node1.invalid"
        assert environ["NCCL_DEBUG"] == 'it\'s "so"; $HOME' and about["args"] == ["it's; *"]
        assert about["cwd"] == os.getcwd()
    assert len({about["environ"]["MASTER_PORT"] for about in ranks(script, 3)}) == 1


def test_a_rank_that_fails_elsewhere_ends_all_and_the_machine_is_named(script, two_machines: Path, caplog, capfd):
    assert launch.start([*script, "fail"], hostfile=two_machines) == 7
    assert "machine node2.invalid ended with exit code 7" in caplog.text
    assert "rank 2 on" in capfd.readouterr().err  # its own supervisor says which
    assert not any(alive(about["pid"]) for about in ranks(script, 3))


@pytest.mark.parametrize(
    ("name", "why"), [("down.invalid", "No route to host"), ("slow.invalid", "no answer within 1 s")]
)
def test_a_machine_that_does_not_answer_is_named_before_anything_starts(
    script, two_machines: Path, name: str, why: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("zoo.training.remote.DEADLINE", 1)
    two_machines.write_text(f"localhost slots=1\n{name} slots=2\n")
    with pytest.raises(LaunchError) as error:
        launch.start([*script, "end"], hostfile=two_machines, master_addr="127.0.0.1")
    assert name in str(error.value) and why in str(error.value)
    assert not list(Path(script[2]).iterdir())


def test_without_ssh_other_machines_are_an_error(script: list[str], two_machines: Path, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="ssh cannot be started"):
        launch.start([*script, "end"], hostfile=two_machines)


def test_two_names_of_this_machine_are_an_error(script: list[str], two_machines: Path):
    two_machines.write_text(f"localhost slots=1\n{HOST} slots=1\n")
    with pytest.raises(HostfileError, match=f"'localhost' and '{HOST}' are both this machine"):
        launch.start([*script, "end"], hostfile=two_machines)


def test_a_signal_reaches_the_ranks_of_all_machines(script: list[str], two_machines: Path, zoo_launch):
    process = zoo_launch("--hostfile", str(two_machines), *script[1:], "suspend")
    ranks(script, 3)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(10) == 75


def test_no_rank_of_any_machine_outlives_a_killed_launcher(script: list[str], two_machines: Path, zoo_launch):
    process = zoo_launch("--hostfile", str(two_machines), *script[1:], "sleep")
    started = ranks(script, 3)
    process.kill()
    wait_for(lambda: not any(alive(about["pid"]) for about in started), 5)


def test_a_supervisor_that_hears_nothing_ends_its_ranks(monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(workers, "PATIENCE", 0.3)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    job = workers.Job(command=command, cwd=".", slots=[1, 1], node=1, master_addr="x", master_port=1)
    ear, mouth = os.pipe()
    try:
        assert workers.Supervisor(workers.start_workers(job, {}), ear).wait() == LOST
    finally:
        os.close(ear)
        os.close(mouth)
    assert "nothing heard from the first machine" in caplog.text


# --- a script that starts its own processes --------------------------------------------------------------------------
TRAINS = """
import sys
from types import SimpleNamespace
from zoo.training.launch import find_place, relaunch

def main():
    more = dict(num_gpus=2, num_nodes=1, hostfile=None, master_ip=None, master_port=None)
    relaunch(SimpleNamespace(**more))
    place = find_place()
    sys.stdout.write(" ".join([str(place.rank), place.launcher, *sys.argv[1:]]) + "\\n")  # whole, though unbuffered
    sys.exit(9 if "fail" in sys.argv else 0)

main()
"""


@pytest.fixture
def trains(tmp_path: Path) -> Path:
    path = tmp_path / "trains.py"
    path.write_text(TRAINS)
    return path


def run(words: list, folder: Path, **more: object) -> subprocess.CompletedProcess:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=folder, env=environ, capture_output=True, text=True, timeout=60, **more)


@pytest.mark.parametrize("words", [["trains.py"], ["-m", "trains"], ["-c", TRAINS], ["-O", "-m", "trains"]])
def test_a_command_starts_itself_in_every_process_with_its_arguments(trains: Path, words: list[str]):
    done = run([sys.executable, *words, "--steps", "a b"], trains.parent)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 zoo --steps a b", "1 zoo --steps a b"]


def test_its_exit_code_is_that_of_its_processes(trains: Path):
    done = run([sys.executable, "trains.py", "fail"], trains.parent)
    assert done.returncode == 9 and "ended with exit code 9" in done.stderr


def test_a_prompt_has_no_command_to_start_again(trains: Path):
    done = run([sys.executable, "-"], trains.parent, input=TRAINS)
    assert done.returncode == 1 and "SettingsError" in done.stderr and "save this as a script" in done.stderr


class Asked:
    """The settings that relaunch reads."""

    num_gpus, num_nodes, hostfile, master_ip, master_port = None, 1, None, None, None

    def __init__(self, **more: object):
        self.__dict__ |= more


@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_deepspeed_trains_in_one_process_that_no_launcher_started(toy, tmp_path: Path, config: str, monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    code = (
        "import runpy, sys; toy = runpy.run_path(sys.argv[1], run_name='toy'); "
        "toy['train'](sys.argv[2], env_type='deepspeed', num_gpus=1, deepspeed_config=sys.argv[3], steps=3)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).with_name("toy.py")), str(tmp_path / "run"), config]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    toy.train(tmp_path / "alone", steps=3)
    alone, deepspeed = (weights.read(tmp_path / name) for name in ("alone", "run"))
    for name in alone:
        torch.testing.assert_close(deepspeed[name], alone[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("asked", [{}, {"num_gpus": 1}])
def test_one_process_is_this_one(asked: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "start", lambda *_, **__: pytest.fail("started"))
    assert launch.relaunch(Asked(**asked)) is None


def test_what_a_launcher_started_starts_nothing(monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(launch, "start", lambda *_, **__: pytest.fail("started"))
    monkeypatch.setattr(launch.os, "environ", {"RANK": "0", "WORLD_SIZE": "1"})
    caplog.set_level(logging.WARNING)
    launch.relaunch(Asked(num_gpus=2))
    assert "started one process only" in caplog.text


def test_a_bad_hostfile_is_said_before_anything_starts(tmp_path: Path):
    (tmp_path / "hostfile").write_text("localhost slots=0\n")
    with pytest.raises(HostfileError, match="line 1"):
        launch.relaunch(Asked(hostfile=tmp_path / "hostfile"))


# --- other launchers, themselves -------------------------------------------------------------------------------------
def bin_of(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def test_accelerates_one_process_of_two_is_refused(trains: Path):
    done = run([bin_of("accelerate"), "launch", "--cpu", "--num_processes", "2", "trains.py"], trains.parent)
    assert done.returncode != 0 and done.stdout == ""
    assert "accelerate was to start several processes and started one" in done.stderr and "--multi_gpu" in done.stderr


@pytest.mark.parametrize(
    ("word", "port", "refused"),
    [
        ("--num-processes=1", "29500", False),
        ("--num_processes=2", "29500", True),
        ("--config_file", "29500", True),  # the number is in the file; the port tells
        ("--config_file", None, False),
    ],
)
def test_accelerates_single_process_is_not_refused(word: str, port: str | None, refused: bool, tmp_path: Path):
    child = "from zoo.training.launch import check_accelerate; check_accelerate()"
    parent = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {child!r}]).returncode)"
    environ = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no"} | ({"MASTER_PORT": port} if port else {})
    done = subprocess.run([sys.executable, "-c", parent, word], cwd=ROOT, env=environ, capture_output=True, timeout=20)
    assert done.returncode == refused


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        ("torchrun", ["torchrun", "--nproc-per-node", "2", "--master-port", "PORT"]),
        ("accelerate", ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "PORT"]),
        ("deepspeed", ["deepspeed", "--num_gpus", "2", "--master_port", "PORT", "--no_local_rank"]),
    ],
)
@pytest.mark.slow
def test_the_same_script_runs_under_every_launcher(trains: Path, launcher: str, words: list[str]):
    words = [word.replace("PORT", str(workers.free_port())) for word in words]
    done = run([bin_of(words[0]), *words[1:], "trains.py", "--steps", "3"], trains.parent)
    assert done.returncode == 0, done.stderr
    for rank in "01":
        assert f"{rank} {launcher} --steps 3" in done.stdout


TRAIN = ["examples/train_clip.py", "--env-type", "pytorchDDP", "--steps", "1000", "--batch-size", "8", "--run-folder"]


def trainers(folder: Path) -> list[int]:
    """The processes that train there: they say so in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:
            continue
        if str(folder) in words and words[1:2] in (["-u"], TRAIN[:1]):
            found.append(int(path.parent.name))
    return [pid for pid in found if alive(pid)]


@pytest.mark.parametrize(
    ("words", "killed"),
    [
        (["torchrun", "--nproc-per-node", "2", "--master-port", "PORT"], "torchrun"),
        (["deepspeed", "--num_gpus", "2", "--master_port", "PORT"], "deepspeed.launcher.launch"),
        (["deepspeed", "--num_gpus", "2", "--master_port", "PORT"], "bin/deepspeed"),
        (["zoo", "launch", "--num-gpus", "2"], "launch"),
    ],
)
@pytest.mark.slow
def test_no_trainer_outlives_its_launcher(words: list[str], killed: str, tmp_path: Path):
    words = [word.replace("PORT", str(workers.free_port())) for word in words]
    command = [bin_of(words[0]), *words[1:], *TRAIN, str(tmp_path / "run")]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=said, start_new_session=True)
    try:
        wait_for(lambda: (tmp_path / "run" / "log.jsonl").exists(), 60)
        assert len(trainers(tmp_path / "run")) >= 2
        launchers = [process.pid, *children(process.pid)]
        (pid,) = [pid for pid in launchers if any(w.endswith(killed) for w in cmdline(pid))][-1:]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not trainers(tmp_path / "run"), 10)
    finally:
        for pid in trainers(tmp_path / "run"):
            os.kill(pid, signal.SIGKILL)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if words[0] != "zoo":  # whose ranks are killed with it
        assert "the launcher was killed" in (tmp_path / "said").read_text()


def children(pid: int) -> list[int]:
    """The child processes of all threads."""
    return [int(n) for path in Path(f"/proc/{pid}/task").glob("*/children") for n in path.read_text().split()]


def cmdline(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


@pytest.mark.slow
def test_a_training_that_is_asked_to_leave_has_saved(tmp_path: Path):
    folder = tmp_path / "run"
    words = [*TRAIN[:3], "--batch-size", "8", "--log-interval", "1", "--run-folder", str(folder), "--steps"]
    command = [bin_of("zoo"), "launch", "--num-gpus", "2", *words]
    process = subprocess.Popen([*command, "1000"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        wait_for(lambda: (folder / "log.jsonl").exists() and (folder / "log.jsonl").read_text(), 60)
        process.send_signal(signal.SIGUSR1)
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75, said
    assert list((folder / "checkpoints").iterdir())


# --- the command line ------------------------------------------------------------------------------------------------
def test_the_command_runs_scripts_and_modules(trains: Path, capfd, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(trains.parent)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert main(["launch", "--num-gpus", "2", "trains.py", "--num-gpus", "5"]) == 0
    assert sorted(capfd.readouterr().out.splitlines()) == ["0 zoo --num-gpus 5", "1 zoo --num-gpus 5"]
    assert main(["launch", "--num-gpus", "1", "-m", "trains"]) == 0
    assert capfd.readouterr().out == "0 zoo\n"


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--num-gpus", "0", "x.py"], "--num-gpus: invalid whole value: '0'"),
        (["--hostfile", "missing", "x.py"], "hostfile missing cannot be read"),
        (["--num-nodes", "2", "--num-gpus", "1", "x.py"], "num_nodes=2 needs a hostfile"),
        ([], "required: SCRIPT"),
    ],
)
def test_what_cannot_be_started_is_one_line(words: list[str], why: str, capsys: pytest.CaptureFixture):
    assert main(["launch", *words]) == 2
    said = capsys.readouterr()
    assert why in said.err and said.err.count("\n") == 1 and said.out == ""


def test_the_slurm_script_requeues_what_was_suspended_and_nothing_else(tmp_path: Path):
    for code, requeued in ((75, True), (0, False), (1, False)):
        folder = tmp_path / str(code)
        folder.mkdir()
        for name, body in {"srun": f"exit {code}", "scontrol": 'echo "$@" > requeued'}.items():
            (folder / name).write_text(f"#!/bin/sh\n{body}\n")
            (folder / name).chmod(0o755)
        environ = {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "42"}
        words = ["bash", ROOT / "examples" / "slurm_requeue.sh"]
        done = subprocess.run(words, cwd=folder, env=environ, capture_output=True, text=True, timeout=20)
        assert done.returncode == (0 if requeued else code), done.stderr
        assert (folder / "requeued").exists() == requeued
    assert (tmp_path / "75" / "requeued").read_text() == "requeue 42\n"


def test_the_slurm_script_passes_its_signal_on_to_the_tasks():
    text = (ROOT / "examples" / "slurm_requeue.sh").read_text()
    assert "#SBATCH --signal=USR1@120" in textwrap.dedent(text)


@pytest.mark.slow
def test_a_hostfile_that_deepspeed_does_not_find_is_an_error(tmp_path: Path):
    command = [bin_of("deepspeed"), "--master_port", str(workers.free_port()), "--hostfile", str(tmp_path / "none")]
    done = subprocess.run(
        [*command, *TRAIN, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    assert done.returncode != 0
    assert f"{tmp_path / 'none'}: there is no such file" in done.stderr
