"""The offline guard of conftest.py: it stops a test at the network's door, even one that swallows the error."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
TRIES = {
    "connects": "socket.socket().connect(('192.0.2.1', 80))",
    "connects_quietly": "socket.socket().connect_ex(('192.0.2.1', 80))",
    "looks_up": "socket.getaddrinfo('example.com', 443)",
}


@pytest.fixture
def guarded(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nmarkers =\n    hub: network\n")
    return pytester


@pytest.mark.parametrize("call", TRIES.values(), ids=TRIES)
def test_a_test_that_swallows_the_refusal_still_fails(guarded: pytest.Pytester, call: str):
    guarded.makepyfile(f"import socket\ndef test_it():\n    try:\n        {call}\n    except OSError:\n        pass\n")
    result = guarded.runpytest()
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*reached for the network*"])


def test_the_hub_mark_lifts_the_guard(guarded: pytest.Pytester):
    guarded.makepyfile(
        """
        import socket, pytest
        free = socket.socket.connect
        @pytest.mark.hub
        def test_marked():
            assert socket.socket.connect is free
        def test_plain():
            assert socket.socket.connect is not free
        """
    )
    guarded.runpytest().assert_outcomes(passed=2)


def test_this_machine_may_be_asked():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()


def test_a_name_that_never_resolves_may_be_asked():
    with pytest.raises(socket.gaierror):
        socket.getaddrinfo("nowhere.invalid", 443)


def test_the_cache_is_not_the_users(tmp_path_factory: pytest.TempPathFactory):
    assert Path(os.environ["ZOO_HOME"]).is_relative_to(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize(
    ("expression", "offline"),
    [("", False), ("hub", False), ("slow or hub", False), ("slow", True), ("not slow and not hub", True)],
)
def test_the_hub_is_offline_unless_its_tests_are_asked_for(guarded: pytest.Pytester, expression: str, offline: bool):
    guarded.makepyfile("import os\nprint('offline is', os.environ.get('HF_HUB_OFFLINE'))\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "as it was")  # so that what the inner run sets is undone
        patch.delenv("HF_HUB_OFFLINE")
        result = guarded.runpytest("-s", "-m", expression)
    result.stdout.fnmatch_lines([f"*offline is {'1' if offline else 'None'}"])
