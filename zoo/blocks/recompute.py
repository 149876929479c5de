"""Activations computed twice so that they need not be kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def _still_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norm normalises by its batch as before, but its running statistics do not move a second time."""
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
    before = [(m.momentum, m.num_batches_tracked.clone()) for m in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(count)


def recompute(module: nn.Module, *inputs: Tensor, call: Callable[..., Tensor] | None = None) -> Tensor:
    """`module(*inputs)`, or `call(*inputs)` where call uses the module, with its inner activations computed again in
    the backward pass. Random draws are the same both times and batch-norm statistics move once."""
    contexts = lambda: (nullcontext(), _still_statistics(module))  # noqa: E731
    return checkpoint(call or module, *inputs, use_reentrant=False, context_fn=contexts)
