"""Chance under control: python's, numpy's and torch's random numbers, seeded, kept, stored."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_from(*numbers: int) -> int:
    """Whole numbers -> one 63-bit seed; near numbers give unrelated seeds."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_cpu(*numbers: int) -> None:
    """Seeds python, numpy and torch's CPU generator."""
    seed = seed_from(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def seed_all(*numbers: int) -> None:
    """As seed_cpu, and the accelerators' generators."""
    seed_cpu(*numbers)
    torch.manual_seed(seed_from(*numbers))


def get_state(device: torch.device | None = None) -> dict[str, Any]:
    """The state of all generators; of the GPU's too when `device` is one."""
    kind, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest], "torch": torch.get_rng_state()}
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_state(state: dict[str, Any], device: torch.device | None = None) -> None:
    """The reverse of get_state. A run that moved from the CPU to a GPU has no state for it, which is left alone."""
    random.setstate(state["python"])
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if device is not None and device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def kept(device: torch.device | None = None) -> Iterator[None]:
    """What is drawn inside does not change what is drawn after."""
    python, numpy, torch_cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device is not None and device.type == "cuda" else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
