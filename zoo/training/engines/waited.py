"""How long a process waits for DeepSpeed's collectives, where waiting shows on the host: on CPUs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

_COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "all_to_all_single",
)


class Waited:
    """Seconds per update in the collectives of DeepSpeed's `backend`, which is wrapped once. Nothing on a GPU, where
    calls return before the work is done."""

    def __init__(self, backend: Any, device: torch.device):
        self.updates, self.backend, self.last = 0, backend, 0.0
        if device.type == "cpu" and not hasattr(backend, "zoo_waited"):
            backend.zoo_waited = 0.0
            for name in _COLLECTIVES:
                if hasattr(backend, name):
                    setattr(backend, name, _timed(backend, getattr(backend, name)))
        self.last = getattr(backend, "zoo_waited", 0.0)

    def figures(self) -> dict[str, float]:
        """{"comm_s": seconds per update since the last call}."""
        if not self.updates or not hasattr(self.backend, "zoo_waited"):
            return {}
        seconds = (self.backend.zoo_waited - self.last) / self.updates
        self.last, self.updates = self.backend.zoo_waited, 0
        return {"comm_s": seconds}


def _timed(backend: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any, **words: Any) -> Any:
        start = time.perf_counter()
        try:
            return call(*args, **words)
        finally:
            backend.zoo_waited += time.perf_counter() - start

    return timed
