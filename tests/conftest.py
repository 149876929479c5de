"""Tests run without network, in a cache folder of their own, on one thread."""

from __future__ import annotations

import ipaddress
import os
import re
import socket

import pytest


def hub_asked_for(mark_expression: str) -> bool:
    """Whether `pytest -m EXPRESSION` can select a test with the hub mark."""
    return not mark_expression or bool(re.search(r"(?<!not )\bhub\b", mark_expression))


def pytest_configure(config: pytest.Config) -> None:
    # Before any test file is imported: the libraries read these once. One thread whatever the shell says: a test that
    # forks after OpenMP has started threads would hang in the child.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not hub_asked_for(config.option.markexpr):
        os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(tmp_path_factory.mktemp("zoo_home")))
        yield


def is_loopback(host: object) -> bool:
    """True for this machine's own names and addresses; an empty host means "any of this machine"."""
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True)
def _no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Fail a test without the hub mark that looks up or connects to another machine, though it swallow the error."""
    if request.node.get_closest_marker("hub"):
        yield
        return
    attempts: list[str] = []
    connect, connect_ex, getaddrinfo = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def check(host: object) -> None:
        if not is_loopback(host):
            attempts.append(str(host))
            raise ConnectionRefusedError(f"tests run without network, and this one asked for {host}: mark it hub")

    def guarded_getaddrinfo(host, *args, **kwargs):
        if str(host).endswith(".invalid"):  # names that never resolve, RFC 6761: a test may ask for one
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        check(host)
        return getaddrinfo(host, *args, **kwargs)

    def guard(original):
        def guarded(self, address):
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(address[0])
            return original(self, address)

        return guarded

    monkeypatch.setattr(socket.socket, "connect", guard(connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guard(connect_ex))
    monkeypatch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
    yield
    if attempts:
        pytest.fail(f"reached for the network: {', '.join(attempts)}")
