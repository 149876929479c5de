"""A moving average of the weights. It follows the engine: under ZeRO each rank averages the part that it holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from zoo.errors import SettingsError

from .engines import Engine
from .engines.base import EMA, WEIGHTS, Piece, Source


class Ema:
    """Averages of the trained weights: decay * average + (1 - decay) * weights after each update.

    The decay rises as (1 + n) / (10 + n) to its value, so that the average forgets the first weights (Polyak averaging
    as in TensorFlow's ExponentialMovingAverage with num_updates).
    """

    def __init__(self, decay: float, engine: Engine):
        self.decay, self.engine, self.updates = decay, engine, 0
        if engine.swaps:
            raise SettingsError(
                "ema needs the weights at every update, and NVMe holds them: set ema=0, or offload to cpu"
            )
        self.live = {name: p for name, p in engine.pieces()[WEIGHTS].items() if name in engine.trained}
        if any(p.values.dtype != torch.float32 for p in self.live.values()):
            raise SettingsError("ema needs weights in fp32, and deepspeed_config keeps them in bf16: set ema=0")
        self.pieces = {name: Piece(p.values.clone(), p.shape, p.start) for name, p in self.live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """An update of the weights was made."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, values = ([p.values for p in pieces.values()] for pieces in (self.pieces, self.live))
        if averages:  # a rank may hold no part of a small model
            torch._foreach_lerp_(averages, values, 1 - decay)

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
        for name, piece in self.pieces.items():
            source.fill(EMA, name, piece)
