"""Whether the other ranks and the launcher still live. Who is left alone says so and ends, and does not hang."""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import threading
import time
from dataclasses import dataclass, field

from zoo.errors import LaunchError

from ..launch import parent_of
from ..place import LOST, MARK, ORPHANED, Place

BEAT = 1.0  # seconds between two signs of life
AFTERMATH = 1.5  # seconds between a loss and leaving: the launcher shall see first who began
_ALIVE, _GOODBYE, _LOST = b".", b"bye", b"lost "  # one a line
logger = logging.getLogger("zoo.training")


@dataclass
class _Peer:
    """The other end of a connection: how long it has been silent, and what has come of a line that is not whole yet."""

    rank: int
    host: str
    link: socket.socket
    silence: float = 0.0
    rest: bytes = field(default=b"")

    def lines(self) -> list[bytes]:
        """What it says. Raises EOFError when the connection is closed or broken."""
        try:
            data = self.link.recv(4096)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError as error:
            raise EOFError(error.strerror or "broken") from error
        if not data:
            raise EOFError("closed")
        *lines, self.rest = (self.rest + data).split(b"\n")
        self.silence = 0.0
        return lines

    def say(self, line: bytes) -> None:
        """Sends a line if there is room for it; who does not read is found by its silence, not by this."""
        try:
            self.link.send(line + b"\n")
        except OSError:
            pass


class Listener:
    """Rank 0's end, open at `port` before the others are told of it."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("", 0), backlog=1024)
        self.port: int = self.socket.getsockname()[1]


def _first_line(link: socket.socket) -> bytes:
    """Read byte by byte: what follows is for the watch."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 300 and (byte := link.recv(1)):
        line += byte
    return line


class Heartbeat:
    """A thread that ends this process, with exit code 70, when another rank dies, falls silent or cannot be reached.

    Rank 0 hears every other rank, and tells all of them whom it lost. `patience` is how many seconds a rank may be
    silent. When the launcher was killed the process ends with exit code 71. Stopping all processes and continuing them
    later (SIGSTOP, SIGCONT) is no silence. `close` says goodbye: ranks may leave at different times.
    """

    def __init__(self, place: Place, patience: float, address: str, port: int, listener: Listener | None = None):
        self.place, self.patience, self.address, self.port = place, patience, address, port
        self.listener = listener
        self.peers: list[_Peer] = []
        self.launcher = os.getppid()
        # `deepspeed` runs a launcher of its own below it, which goes on when `deepspeed` is killed.
        self.above = parent_of(self.launcher) if place.launcher == "deepspeed" else None
        self._closing, self._bell = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    @staticmethod
    def listen() -> Listener:
        """What rank 0 opens first: its `port` is what the others need."""
        return Listener()

    def start(self) -> None:
        """Meets the other ranks, all of which call this, then watches. Raises LaunchError after `patience` seconds."""
        if MARK in os.environ and os.environ[MARK] != str(self.launcher):
            self._end(ORPHANED, "the launcher was killed", 0)
        if self.place.rank == 0:
            self._accept()
        else:
            self._connect()
        for peer in self.peers:
            peer.link.setblocking(False)
        os.register_at_fork(after_in_child=self._forget)  # a child that outlives us must not hold our connections open
        self._thread.start()

    def close(self) -> None:
        """Says goodbye to the others. Harmless when called twice."""
        if self._thread.is_alive():
            self._bell.send(b"!")
            self._thread.join(5)

    def _accept(self) -> None:
        missing = set(range(1, self.place.world_size))
        deadline = time.monotonic() + self.patience
        while missing:
            self.listener.socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                link, _ = self.listener.socket.accept()
                link.settimeout(max(0.01, deadline - time.monotonic()))
                word, rank, host = _first_line(link).decode().split()
                if word != "zoo" or int(rank) not in missing:
                    raise ValueError(word)
            except TimeoutError as error:
                names = ", ".join(map(str, sorted(missing)))
                raise LaunchError(
                    f"rank {names}: no heartbeat within {self.patience:g} s. The machines must reach {self.address}, "
                    f"port {self.port}; heartbeat=0 does without"
                ) from error
            except (ValueError, OSError):  # somebody else's connection
                continue
            missing.discard(int(rank))
            self.peers.append(_Peer(int(rank), host, link))
        self.listener.socket.close()

    def _connect(self) -> None:
        try:
            link = socket.create_connection((self.address, self.port), timeout=self.patience)
            link.sendall(f"zoo {self.place.rank} {socket.gethostname()}\n".encode())
        except OSError as error:
            raise LaunchError(
                f"rank {self.place.rank} cannot reach rank 0 at {self.address}, port {self.port} ({error}): "
                "open the ports between the machines; heartbeat=0 does without"
            ) from error
        self.peers.append(_Peer(0, self.address, link))

    def _watch(self) -> None:
        """The thread: a round at every word from a peer, and at least once a second."""
        before, sent = time.monotonic(), 0.0
        while True:
            ready = self._wait(BEAT / 2)
            now = time.monotonic()
            # A pause of this very thread, as after SIGCONT, is nobody else's silence.
            slept, before = min(now - before, BEAT), now
            if os.getppid() != self.launcher or (self.above and parent_of(self.launcher) != self.above):
                self._end(ORPHANED, "the launcher was killed", 0)
            for peer in list(self.peers):
                peer.silence += slept
                if peer.link.fileno() in ready:
                    self._hear(peer)
                if peer in self.peers and peer.silence > self.patience:
                    self._lose(peer, f"it has been silent for {peer.silence:.0f} s: it hangs, or the link is down")
            if self._closing.fileno() in ready:
                return self._part()
            if now - sent >= BEAT:
                sent = now
                for peer in self.peers:
                    peer.say(_ALIVE)

    def _wait(self, seconds: float) -> set[int]:
        poll = select.poll()
        for link in (self._closing, *(peer.link for peer in self.peers)):
            poll.register(link, select.POLLIN)
        return {number for number, _ in poll.poll(seconds * 1000)}

    def _hear(self, peer: _Peer) -> None:
        try:
            lines = peer.lines()
        except EOFError as error:
            return self._lose(peer, f"its connection is {error}, it did not say goodbye: it has died")
        for line in lines:
            if line == _GOODBYE:
                peer.link.close()
                self.peers.remove(peer)
                return
            if line.startswith(_LOST):
                self._end(LOST, line.removeprefix(_LOST).decode(errors="replace"), AFTERMATH)

    def _lose(self, lost: _Peer, why: str) -> None:
        text = f"rank {lost.rank} on {lost.host} is lost: {why}"
        for peer in self.peers:
            if peer is not lost:
                peer.say(_LOST + text.encode())
        self._end(LOST, text, AFTERMATH)

    def _part(self) -> None:
        """Says goodbye, and waits until the others have heard it: a closed socket could swallow the last word."""
        for peer in self.peers:
            peer.say(_GOODBYE)
            try:
                peer.link.shutdown(socket.SHUT_WR)
                peer.link.settimeout(2)
                while peer.link.recv(4096):
                    pass
            except OSError:
                pass
            peer.link.close()

    def _forget(self) -> None:
        for peer in self.peers:
            peer.link.close()

    def _end(self, code: int, why: str, delay: float) -> None:
        """Says why, and ends the process at once, whatever its main thread waits for."""
        speech = threading.Thread(target=self._speak, args=(why,), daemon=True)
        speech.start()  # in a thread of its own: the main thread may hold the lock of the stream
        time.sleep(delay)
        speech.join(2)
        os._exit(code)

    def _speak(self, why: str) -> None:
        logger.critical("rank %d on %s ends: %s", self.place.rank, socket.gethostname(), why)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
