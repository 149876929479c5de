"""How DDP sends gradients: whole, in half precision, or as PowerSGD's two thin matrices."""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

_START = 10  # updates before PowerSGD compresses: early gradients change too fast for its warm-started factors


class Reduce:
    """What an update sends from each rank into the average. `payload` is what it is without PowerSGD."""

    def __init__(self, payload: int, state: powerSGD_hook.PowerSGDState | None = None):
        self.payload, self.state = payload, state
        self.sent = self.updates = self.counted = 0

    def count(self) -> None:
        """An update's gradients were sent."""
        self.updates += 1
        # PowerSGD's state counts numbers as it compresses them, each of which is fp32; before that, all are sent.
        compressed = self.state.total_numel_after_compression - self.counted if self.state else 0
        self.counted += compressed
        self.sent += 4 * compressed or self.payload

    def figures(self) -> dict[str, float]:
        """Bytes per update since the last call."""
        found = {"bytes_sent": self.sent / self.updates} if self.updates else {}
        self.sent = self.updates = 0
        return found


def choose_reduce(how: str, model: DistributedDataParallel, trained: Iterable[nn.Parameter]) -> Reduce:
    """`default` (fp32), `bf16`, `fp16`, or `powersgd` with its rank, as `powersgd:4`."""
    numbers = sum(p.numel() for p in trained)
    if how == "default":
        return Reduce(4 * numbers)
    if how in _HALVES:
        model.register_comm_hook(dist.group.WORLD, _HALVES[how])
        return Reduce(2 * numbers)
    state = powerSGD_hook.PowerSGDState(
        dist.group.WORLD, matrix_approximation_rank=int(how.partition(":")[2] or 1), start_powerSGD_iter=_START
    )
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return Reduce(4 * numbers, state)


# torch wraps its own bf16 hook in a check for NCCL; gloo adds bf16 as well, so the hook is called through ours, which
# has no annotations, for DDP compares them.
def _bf16(state, bucket):
    return default_hooks.bf16_compress_hook(state, bucket)


_HALVES = {"bf16": _bf16, "fp16": default_hooks.fp16_compress_hook}
