"""Several processes, each with a copy of the model, whose gradients are averaged: torch's DistributedDataParallel."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..settings import Settings
from . import process_group
from .base import ForwardStep
from .pytorch import PytorchEngine
from .reduce import choose_reduce


class DdpEngine(PytorchEngine):
    """See `Engine`. All ranks hold the same weights, bit for bit."""

    @staticmethod
    def join(settings: Settings) -> None:
        process_group.join(settings)

    def __init__(
        self, model: nn.Module, optimizer: Any, settings: Settings, forward_step: ForwardStep, *, trains: bool = True
    ):
        super().__init__(model, optimizer, settings, forward_step, trains=trains)
        if not trains:
            return
        self.waiting = ExitStack()
        # Of kernels of one pixel, whose strides may be written in two ways that mean the same.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        self.wrapped = DistributedDataParallel(
            self.plain,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            # Buffers follow each rank's data; they become rank 0's where somebody reads them (`share_buffers`).
            forward_sync_buffers=False,
            find_unused_parameters=settings.find_unused_parameters,
            gradient_as_bucket_view=True,
            static_graph=_is_static(settings),
        )
        self.reduce = choose_reduce(settings.reduce, self.wrapped, self.trained.values())

    def _find_device(self, settings: Settings) -> torch.device:
        return process_group.local_device(settings)

    def forward(self, batch: Any) -> Mapping[str, Any]:
        # The micro-batches before the last one send nothing; DDP decides that in the forward as well as the backward.
        if self.micro + 1 < self.settings.gradient_accumulation_steps:
            self.waiting.enter_context(self.wrapped.no_sync())
        return super().forward(batch)

    def backward(self, loss: Tensor) -> None:
        try:
            super().backward(loss)
        finally:
            self.waiting.close()
        if self.due:
            self.reduce.count()

    def figures(self) -> dict[str, float]:
        found = super().figures() | self.reduce.figures()
        # Nanoseconds of the updates that DDP has timed: what the backward pass does not hide of the communication.
        times = self.wrapped._get_ddp_logging_data()
        if times.get("avg_backward_comm_time"):
            waited = times["avg_backward_comm_time"] - times["avg_backward_compute_comm_overlap_time"]
            found["comm_s"] = waited / 1e9
        return found


def _is_static(settings: Settings) -> bool:
    """Whether DDP may take it that every update uses the same parameters as often.

    A checkpoint that is re-entrant uses them twice in a backward pass, which DDP refuses otherwise. With micro-batches
    that send nothing a static graph fails inside torch 2.13.0.
    """
    whole = settings.gradient_accumulation_steps == 1 and not settings.find_unused_parameters
    return settings.checkpoint_activations and whole
