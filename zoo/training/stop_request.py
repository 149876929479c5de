"""Asked to stop: the run ends at the next update, with a checkpoint, not in the middle of one."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class StopRequest:
    """While open, the first Ctrl-C only sets `asked`; a second one interrupts at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before = None

    def __enter__(self) -> StopRequest:
        # Signals reach python code of the main thread only; elsewhere Ctrl-C keeps its usual way.
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
