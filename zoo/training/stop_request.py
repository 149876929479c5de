"""Asked to stop: all ranks end at the same update, with a checkpoint, not in the middle of one."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType

from zoo.distributed import Channel

FILE = "STOP"  # made in the run folder, it suspends the run
_CTRL_C, _SIGTERM, _SIGUSR1, _FILE, _TIME, _SIMULATED = range(1, 7)
_SIGNALS = {signal.SIGINT: _CTRL_C, signal.SIGTERM: _SIGTERM}
if hasattr(signal, "SIGUSR1"):  # not on Windows
    _SIGNALS[signal.SIGUSR1] = _SIGUSR1
REASONS = {
    _CTRL_C: "Ctrl-C",
    _SIGTERM: "SIGTERM",
    _SIGUSR1: "SIGUSR1",
    _FILE: f"the file {FILE}",
    _TIME: "the time limit",
    _SIMULATED: "simulate_suspend",
}
_LOOK = 1.0  # seconds between two looks for the file, which may lie on a far disk


class StopRequest:
    """While open, signals, a file `STOP` in `folder`, or `minutes` that are over only ask; `agreed` gives the answer.

    A second Ctrl-C interrupts at once.
    """

    def __init__(self, channel: Channel, *, folder: Path | None = None, minutes: float | None = None):
        self.channel, self.file = channel, folder / FILE if folder else None
        self.until = None if minutes is None else time.monotonic() + 60 * minutes
        self.asked = 0
        self._before: dict[int, object] = {}
        self._looked = 0.0

    def __enter__(self) -> StopRequest:
        # Signals reach python code of the main thread only; elsewhere they keep their usual way.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.asked == _CTRL_C:
            raise KeyboardInterrupt
        self.asked = _SIGNALS[number]

    def simulate(self) -> None:
        """Asks as if a signal had come."""
        self.asked = self.asked or _SIMULATED

    def agreed(self) -> str | None:
        """Why to stop now, in words, the same on every rank; None to go on. Once per update, on every rank."""
        now = time.monotonic()
        if self.file is not None and now - self._looked > _LOOK:
            self._looked = now
            self.asked = self.asked or (_FILE if self.file.exists() else 0)
        if self.until is not None and now > self.until:
            self.asked = self.asked or _TIME
        (code,) = self.channel.maximum(self.asked)
        return REASONS.get(int(code))

    def done(self) -> None:
        """The request was met: the file is taken away, so that the next start goes on."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)


def is_ctrl_c(reason: str) -> bool:
    """Whether somebody at the keyboard stopped it, rather than a scheduler."""
    return reason == REASONS[_CTRL_C]
