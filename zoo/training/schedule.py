"""The learning rate: a pure function of the step, for every parameter group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from zoo.errors import SettingsError


def lr_at(step: int, *, peak: float, total: int, warm_up: int, decay: str = "cosine", floor: float = 0.0) -> float:
    """The rate of update `step` (0 is the first) of `total`.

    It rises linearly over `warm_up` steps, the last of which has `peak`, then falls towards `floor` * peak, which it
    would reach at step `total`, or stays ("constant").
    """
    if step < warm_up:
        return peak * (step + 1) / warm_up
    if decay == "constant":
        return peak
    done = min(1.0, (step - warm_up) / max(1, total - warm_up))
    left = 0.5 * (1 + math.cos(math.pi * done)) if decay == "cosine" else 1 - done
    return peak * (floor + (1 - floor) * left)


def cosine(step: int, start: float, end: float, over: int) -> float:
    """From `start` at step 0 along half a cosine to `end` at step `over`, and `end` from there on."""
    done = min(1.0, step / over) if over else 1.0
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * done))


def warm_up_steps(warm_up: float, total: int) -> int:
    """Below 1 a fraction of the run, from 1 on steps."""
    return round(warm_up * total) if warm_up < 1 else min(round(warm_up), total)


class Schedule:
    """Step -> the rate of each parameter group.

    `client` is None (`lr_at` says), a function step -> lr, or a torch scheduler, which is stepped once per update.
    Groups keep the ratio of their rates at the start, except under a torch scheduler, which has its own for each.
    """

    def __init__(self, groups: Sequence[float], lr_of: Callable[[int], float], client: Any = None):
        if isinstance(client, ReduceLROnPlateau):
            raise SettingsError(
                "lr_scheduler=ReduceLROnPlateau needs an evaluation: give a function step -> lr instead"
            )
        if client is not None and not callable(client) and not isinstance(client, LRScheduler):
            raise SettingsError(f"lr_scheduler is a {type(client).__name__}: give a torch scheduler or a function")
        self.torch = client if isinstance(client, LRScheduler) else None
        self.lr_of = client if client is not None and self.torch is None else lr_of
        self.own = client is None
        self.groups = list(groups)
        self.ratios = [lr / groups[0] if groups[0] else 1.0 for lr in groups]

    def __call__(self, step: int) -> list[float]:
        if self.torch is not None:
            return [float(lr) for lr in self.torch.get_last_lr()]
        lr = float(self.lr_of(step))
        return [lr * ratio for ratio in self.ratios]

    def advance(self) -> None:
        """One update is done."""
        if self.torch is not None:
            self.torch.step()

    def state(self) -> dict[str, Any] | None:
        return self.torch.state_dict() if self.torch is not None else None

    def load(self, state: dict[str, Any] | None) -> None:
        if self.torch is not None and state is not None:
            self.torch.load_state_dict(state)
