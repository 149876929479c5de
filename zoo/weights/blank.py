"""Building a model whose numbers are about to be replaced: no numbers are drawn, and no memory is taken for them.

`torch.device("meta")` takes none either, but there the first drawing or multiplication makes torch import its compiler,
which takes seconds, and a buffer outside the state is lost.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DRAWN = (torch.randn, torch.rand)
_FILLED = frozenset("normal_ uniform_ kaiming_normal_ kaiming_uniform_ xavier_normal_ xavier_uniform_ erfinv_".split())


class _Blank(TorchFunctionMode):
    """Leaves tensors that would be filled with random numbers as they come from the system: not in memory at all."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWN:
            return torch.empty(*args, **{name: value for name, value in kwargs.items() if name != "generator"})
        name = getattr(func, "__name__", "")
        # Zeros of a parameter are replaced as well, and of a large network filling them takes a second.
        if name in _FILLED or (name == "zero_" and args and isinstance(args[0], torch.nn.Parameter)):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def uncollected() -> Iterator[None]:
    """Thousands of new objects set off collections of all that was ever imported, which take longer than they: not in
    this block."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def blank() -> Iterator[None]:
    """Models built in this block await `load`: their random or zero parameters are blank, all else is as ever."""
    # trunc_normal_ draws until all numbers are within its bounds, which for blank ones may be never.
    redraw = torch.nn.init._no_grad_trunc_normal_
    torch.nn.init._no_grad_trunc_normal_ = lambda tensor, *_, **__: tensor
    try:
        with uncollected(), _Blank():
            yield
    finally:
        torch.nn.init._no_grad_trunc_normal_ = redraw
