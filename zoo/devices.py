"""The device that a user asked for, or the best there is."""

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
