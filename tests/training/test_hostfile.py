"""A hostfile says which machines run how many processes, and each fault in it is named with its line."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from zoo.errors import HostfileError, SettingsError
from zoo.training.hostfile import Host, is_loopback, is_this_machine, read_hostfile
from zoo.training.launch import find_hosts

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hostfile(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "hostfile"
        path.write_text(text)
        return path

    return write


def test_comments_and_blank_lines_are_passed_over(hostfile):
    text = "# two machines\n\nnode1 slots=2  # the first\n  \t\n   me@node2.lan   slots=4\n"
    hosts = read_hostfile(hostfile(text))
    assert hosts == [Host("node1", 2), Host("me@node2.lan", 4)]
    assert [host.address for host in hosts] == ["node1", "node2.lan"]


def test_the_repositorys_own_hostfile_is_two_processes_here():
    assert read_hostfile(ROOT / "hostfile") == [Host("localhost", 2)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("node2", "how many processes"),
        ("node2 slots", "how many processes"),
        ("node2 slots=2 gpus=4", "how many processes"),
        ("node2 2", "how many processes"),
        ("node2 slots=", "slots= is no number"),
        ("node2 slots=two", "slots=two is no number"),
        ("node2 slots=0", "slots=0 is no number of processes"),
        ("node2 slots=-1", "slots=-1 is no number"),
        ("node2 slots=1.5", "slots=1.5 is no number"),
        ("node2 slots=²", "slots=² is no number"),
        ("   slots=2", "names no machine"),
        ("-oProxyCommand=x slots=2", "is no machine's name"),
        ("node1 slots=2", "'node1' stands there twice"),
    ],
)
def test_a_fault_is_named_with_its_line(hostfile, line: str, reason: str):
    path = hostfile(f"# machines\nnode1 slots=2\n{line}\n")
    with pytest.raises(HostfileError) as error:
        read_hostfile(path)
    assert f"{path}, line 3" in str(error.value) and reason in str(error.value)


@pytest.mark.parametrize("text", ["", "\n\n", "# node1 slots=2\n"])
def test_an_empty_file_is_an_error(hostfile, text: str):
    with pytest.raises(HostfileError, match="names no machine"):
        read_hostfile(hostfile(text))


def test_a_missing_file_is_an_error(tmp_path: Path):
    with pytest.raises(HostfileError, match="missing.*No such file.*write a line"):
        read_hostfile(tmp_path / "missing")


def test_a_file_that_is_no_text_is_an_error(tmp_path: Path):
    (tmp_path / "hostfile").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(HostfileError, match="it is not text"):
        read_hostfile(tmp_path / "hostfile")


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", socket.gethostname()])
def test_this_machine_knows_itself(name: str):
    assert is_this_machine(name)


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])  # RFC 5737 and 3849: nobody's
def test_another_machine_is_not_this_one(address: str, monkeypatch: pytest.MonkeyPatch):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = [(family, socket.SOCK_STREAM, 0, "", (address, 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    assert not is_this_machine("node2") and not is_loopback("node2")


def test_an_unknown_name_is_not_this_machine():
    assert not is_this_machine("other.invalid") and not is_loopback("other.invalid")


def test_a_loopback_address_is_known():
    assert is_loopback("localhost") and is_loopback("127.0.1.1") and is_loopback("::1")


# --- with what else is asked -----------------------------------------------------------------------------------------
def test_num_nodes_takes_the_first_machines_and_num_gpus_fewer_slots(hostfile):
    path = hostfile("a slots=4\nb slots=4\nc slots=2\n")
    assert find_hosts(path, None, 2) == [Host("a", 4), Host("b", 4)]
    assert find_hosts(path, 1, None) == [Host("a", 1), Host("b", 1), Host("c", 1)]


def test_more_than_the_hostfile_has_is_an_error_with_both_numbers(hostfile):
    path = hostfile("a slots=4\nb slots=2\n")
    with pytest.raises(HostfileError, match="num_nodes=3, .* 2 machines"):
        find_hosts(path, None, 3)
    with pytest.raises(HostfileError, match="num_gpus=3, .* gives b 2 slots"):
        find_hosts(path, 3, None)


def test_several_machines_need_a_hostfile():
    with pytest.raises(SettingsError, match="num_nodes=2 needs a hostfile"):
        find_hosts(None, 2, 2)
