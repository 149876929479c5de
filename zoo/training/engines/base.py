"""The seam between the loop and what runs one training step. Every rank calls every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Engine(Protocol):
    """One training step, cut as the pickiest backend (DeepSpeed) wants it; the others imitate it cheaply.

    Built with (model, optimizer, settings, forward_step, trains=True): `optimizer` is the client's or None, see
    `build_optimizer`; forward_step(batch, model) is the client's forward; with trains=False only `evaluate` is called.
    `model` is the client's module; `device` is where it is; `group_lrs` are the rates of the parameter groups at the
    start; `grad_norm` is the norm before clipping at the last update, a tensor of no dimension, or None before it.
    """

    model: nn.Module
    device: torch.device
    group_lrs: list[float]
    grad_norm: Tensor | None
    optimizer: torch.optim.Optimizer

    def forward(self, batch: Any) -> Mapping[str, Any]:
        """Moves the batch and runs the client's forward step in the run's precision. Owns DDP's no_sync."""

    def evaluate(self, batch: Any) -> Mapping[str, Any]:
        """As forward, without gradients and without counting as a micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of loss / accumulated micro-batches."""

    def step(self, lrs: Sequence[float]) -> bool:
        """Called per micro-batch. True when an accumulated update was due, and was made at these rates, one per group.

        An update whose gradients are not finite is left out; it was due all the same.
        """

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Writes a checkpoint, whole or not at all. `state` is the trainer's; its "rng" is each rank's own.

        Raises DiskFull.
        """

    def load(self, folder: Path) -> dict[str, Any]:
        """Restores what `save` wrote and returns `state`. Raises CheckpointError if damaged, WeightsMismatch."""

    def export(self, path: Path) -> None:
        """Writes the whole weights in fp32 as one safetensors file. Raises DiskFull."""


def to_device(value: Any, device: torch.device) -> Any:
    """Every tensor in nested dicts, lists and tuples, moved."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        moved = [to_device(item, device) for item in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value
