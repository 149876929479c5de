"""Watches the loss: an update that would spoil the weights is left out, or taken back together with its data."""

from __future__ import annotations

import math
import statistics
from collections import deque

from torch import Tensor

from zoo.distributed import Channel

HISTORY, LEAST = 100, 20  # losses that are compared with; and how many there must be
LIMIT = 10.0  # robust standard deviations over the median
BAD_IN_A_ROW = 5  # updates without a finite loss and gradient, after which "rollback" goes back


def is_spike(loss: float, before: deque[float]) -> bool:
    """Whether the loss stands out of those before it, by median and median deviation: one spike does not hide another.

    The deviation has a floor of 1 % of the median, so that losses which hardly move do not call every move a spike.
    """
    if len(before) < LEAST or not math.isfinite(loss):
        return False
    middle = statistics.median(before)
    deviation = 1.4826 * statistics.median(abs(x - middle) for x in before)  # of a normal distribution
    return loss - middle > LIMIT * max(deviation, 0.01 * abs(middle), 1e-8)


class Guard:
    """`on_spike` is "keep", which watches nothing and waits for no device; "skip"; or "rollback". Ranks agree."""

    def __init__(self, on_spike: str, micro: int, channel: Channel):
        self.watches, self.goes_back = on_spike != "keep", on_spike == "rollback"
        self.micro, self.channel = micro, channel
        self.before: deque[float] = deque(maxlen=HISTORY)
        self.losses: list[Tensor] = []
        self.spikes = self.bad = 0
        self.spiked = False

    def pass_on(self, loss: Tensor) -> Tensor:
        """A micro-batch's loss, before its backward. That of a spike becomes nan, which every engine leaves out."""
        if not self.watches:
            return loss
        self.losses.append(loss.detach().float())
        if len(self.losses) < self.micro:
            return loss
        mine = float(sum(self.losses)) / self.micro
        self.losses.clear()
        total, ranks = self.channel.total(mine, 1.0)
        mean = total / ranks
        self.spiked = is_spike(mean, self.before)
        if self.spiked:
            self.spikes += 1
            return loss * float("nan")
        if math.isfinite(mean):
            self.before.append(mean)
        return loss

    def wants_back(self, grad_norm: Tensor) -> bool:
        """After the update: whether to take back what was done since the last checkpoint."""
        if not self.goes_back:
            return False
        self.bad = 0 if math.isfinite(float(grad_norm)) else self.bad + 1
        return self.spiked or self.bad >= BAD_IN_A_ROW

    def state(self) -> dict[str, object]:
        return {"before": list(self.before), "spikes": self.spikes}

    def load(self, state: dict[str, object]) -> None:
        self.before = deque(state["before"], maxlen=HISTORY)
        self.spikes, self.bad, self.spiked = state["spikes"], 0, False
        self.losses.clear()
