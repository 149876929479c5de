"""The device that a user asked for, or the best there is; and what memory is left."""

from __future__ import annotations

import torch

from zoo.errors import DeviceNotFound


def find_device(wanted: str | torch.device | None = None) -> torch.device:
    """None: cuda if there is one, else cpu. Raises DeviceNotFound naming the devices that this machine has."""
    if wanted is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:  # a torch without CUDA asserts
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        here += ["mps"] if torch.backends.mps.is_available() else []
        raise DeviceNotFound(f"this machine has no device {str(wanted)!r}; it has: {', '.join(here)}") from error
    return device


def free_memory() -> float:
    """Bytes of this machine's memory that could be had, or infinity where it does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = dict(line.split(":") for line in lines)
        return 1024 * float(found["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return float("inf")
