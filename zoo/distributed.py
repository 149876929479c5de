"""Rank, world size, a gather that gradients flow through, and channels to agree on. Alone, each is the identity."""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_distributed() -> bool:
    """True once a process group of more than one process is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number, 0 when alone."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes train together, 1 when alone."""
    return dist.get_world_size() if is_distributed() else 1


class _Gather(torch.autograd.Function):
    """All-gather whose backward sums what every rank's loss has to say about this rank's rows."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather(x: Tensor) -> Tensor:
    """This rank's rows (B, ...) -> the rows of all ranks in rank order (W * B, ...), with gradient. Equal B on each."""
    return _Gather.apply(x) if is_distributed() else x


def total(x: Tensor) -> Tensor:
    """The sum of what the ranks have, without gradient."""
    if not is_distributed():
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def average(x: Tensor) -> Tensor:
    """The mean of what the ranks have, without gradient."""
    return total(x) / world_size() if is_distributed() else x


def share_buffers(model: nn.Module) -> None:
    """Every rank gets rank 0's buffers, such as the running statistics of batch norm, which follow each rank's data."""
    if is_distributed():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


class Channel:
    """Words between ranks that do not wait for their devices: a gloo group of its own. All ranks open it together.

    Calls must come in the same order on every rank; two threads of a process need two channels.
    """

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo") if is_distributed() else None

    def maximum(self, *numbers: float) -> list[float]:
        """For each number, the largest that a rank gave. None may be nan, which gloo sees on the first rank only."""
        return self._reduce(numbers, dist.ReduceOp.MAX)

    def total(self, *numbers: float) -> list[float]:
        """For each number, the sum of what the ranks gave."""
        return self._reduce(numbers, dist.ReduceOp.SUM)

    def _reduce(self, numbers: tuple[float, ...], operation: Any) -> list[float]:
        if self.group is None:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(values, operation, group=self.group)
        return values.tolist()

    def exchange(self, value: Any = None) -> list[Any]:
        """What JSON can hold -> that of every rank, in rank order. Nobody goes on before all have come here."""
        if self.group is None:
            return [value]
        text = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size())]
        dist.all_gather(sizes, torch.tensor([len(text)]), group=self.group)
        longest = max(int(size) for size in sizes)
        padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
        texts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(texts, padded, group=self.group)
        return [json.loads(bytes(text[: int(size)].tolist())) for text, size in zip(texts, sizes, strict=True)]
