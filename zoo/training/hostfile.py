"""Which machines a run uses: the hostfile, in DeepSpeed's format, and which of its names mean this machine."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from zoo.errors import HostfileError

_NAME = re.compile(r"([\w.-]+@)?[A-Za-z0-9_:][\w.:%-]*")  # never an option of ssh


@dataclass(frozen=True)
class Host:
    """A machine, as ssh knows it, and how many processes it runs."""

    name: str
    slots: int

    @property
    def address(self) -> str:
        """The name without ssh's user."""
        return self.name.rpartition("@")[2]


def read_hostfile(path: str | Path) -> list[Host]:
    """Lines `name slots=N`, comments after # -> the machines in that order. Raises HostfileError, with the line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise HostfileError(
            f"hostfile {path} cannot be read ({reason}): write a line `name slots=N` for each machine"
        ) from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        host = _host(words, f"{path}, line {number}: {line.strip()!r}")
        if host.name in hosts:
            raise HostfileError(f"{path}, line {number}: {host.name!r} stands there twice: give each machine one line")
        hosts[host.name] = host
    if not hosts:
        raise HostfileError(f"hostfile {path} names no machine: write a line `name slots=N` for each")
    return list(hosts.values())


def _host(words: list[str], where: str) -> Host:
    name, *rest = words
    if name.startswith("slots="):
        raise HostfileError(f"{where} names no machine: write `name slots=N`")
    if not _NAME.fullmatch(name):
        raise HostfileError(f"{where}: {name!r} is no machine's name: write `name slots=N`")
    if len(rest) != 1 or not rest[0].startswith("slots="):
        raise HostfileError(f"{where} does not say how many processes: write `{name} slots=N`")
    count = rest[0].removeprefix("slots=")
    if not count.isascii() or not count.isdigit() or int(count) == 0:
        raise HostfileError(f"{where}: slots={count} is no number of processes: give a whole number, 1 or more")
    return Host(name, int(count))


def is_this_machine(name: str) -> bool:
    """Whether a name or address is this machine's own: one that a socket here can be bound to."""
    if name in ("localhost", socket.gethostname()):
        return True
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except OSError:  # unknown here; ssh may know it
        return False
    return any(_is_own(family, address) for family, _, _, _, address in found)


def is_loopback(name: str) -> bool:
    """Whether a name means, on each machine, that machine itself."""
    try:
        found = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    return any(ipaddress.ip_address(address[0].partition("%")[0]).is_loopback for *_, address in found)


def _is_own(family: int, address: tuple) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
        return True
    except OSError:
        return False
