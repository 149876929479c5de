"""A moving average of the weights. It follows the engine: under ZeRO each rank averages the part that it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from zoo.errors import SettingsError

from .engines import Engine
from .engines.base import EMA, WEIGHTS, Piece, Source


class Ema:
    """Averages of the trained weights: decay * average + (1 - decay) * weights after each update.

    The decay rises as (1 + n) / (10 + n) to its value, so that the average forgets the first weights (Polyak averaging
    as in TensorFlow's ExponentialMovingAverage with num_updates).

    `start`: an update at which the average begins, as those weights; before it there is none, and n counts from it.
    `offload`: it lies in the memory of the CPU, and the weights are copied there after each update, one by one.
    """

    def __init__(self, decay: float, engine: Engine, start: int = 0, offload: bool = False):
        self.decay, self.engine, self.start, self.offload = decay, engine, start, offload
        self.updates = 0
        self.pieces: dict[str, Piece] = {}
        if engine.swaps:
            raise SettingsError(
                "ema needs the weights at every update, and NVMe holds them: set ema=0, or offload to cpu"
            )
        self.live = {name: p for name, p in engine.pieces()[WEIGHTS].items() if name in engine.trained}
        if any(p.values.dtype != torch.float32 for p in self.live.values()):
            raise SettingsError("ema needs weights in fp32, and deepspeed_config keeps them in bf16: set ema=0")
        if not start:
            self._begin()

    def _begin(self) -> None:
        self.pieces = {name: Piece(self._placed(p.values, True), p.shape, p.start) for name, p in self.live.items()}

    def _placed(self, values: Tensor, copy: bool = False) -> Tensor:
        """Values where the average lies; a copy where that is wanted, or needed."""
        return values.detach().to("cpu" if self.offload else values.device, copy=copy)

    @torch.no_grad()
    def update(self) -> None:
        """An update of the weights was made."""
        self.updates += 1
        n = self.updates - self.start
        if n == 0:
            self._begin()
        if n <= 0:
            return
        decay = min(self.decay, (1 + n) / (10 + n))
        pairs = [(self.pieces[name].values, p.values.detach()) for name, p in self.live.items()]
        if self.offload:  # all copies at once would take the memory of one more average
            for average, values in pairs:
                average.lerp_(self._placed(values), 1 - decay)
        elif pairs:  # a rank may hold no part of a small model
            torch._foreach_lerp_(*map(list, zip(*pairs, strict=True)), 1 - decay)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Inside, the model has the averages."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, piece in self.pieces.items():
            kept = self.live[name].values.clone()
            self.live[name].values.copy_(piece.values)
            piece.values.copy_(kept)
        self.engine.refresh()

    def restore(self, source: Source, state: Mapping[str, int]) -> None:
        """Takes over what a checkpoint holds. Raises WeightsMismatch."""
        self.updates = state["updates"]
        if self.updates < self.start:  # a run that goes back may come from where there was one
            self.pieces = {}
            return
        if not self.pieces:
            self._begin()
        for name, piece in self.pieces.items():
            source.fill(EMA, name, piece)
