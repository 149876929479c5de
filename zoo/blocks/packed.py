"""Weights laid out once as the CPU's kernels want them, for many calls of one network.

oneDNN computes convolutions on weights in blocks. Torch keeps them in rows and reorders them at every call, which for
small maps of many channels takes longer than the convolution: at 8 x 8 places of 1,280 channels half of the time in
fp32, and two thirds in bf16. Torch's compiler avoids it by the same two functions that are used here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_OPS = ("_reorder_convolution_weight", "_convolution_pointwise", "_reorder_linear_weight", "_linear_pointwise")


class _PackedConv2d(nn.Conv2d):
    """A convolution with a copy of its weight in blocks, made for the size of the first input."""

    _packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        how = list(self.padding), list(self.stride), list(self.dilation), self.groups
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *how, list(x.shape))
        return torch.ops.mkldnn._convolution_pointwise(x, self._packed, self.bias, *how, "none", [], "")


class _PackedLinear(nn.Linear):
    """A linear layer with a copy of its weight in blocks."""

    _packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D')."""
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, x.numel() // x.shape[-1])
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


@contextmanager
def packed(module: nn.Module) -> Iterator[None]:
    """Inside, the convolutions of `module`, and in bf16 its linear layers, keep their weights a second time, in blocks.

    For inference on a CPU: elsewhere nothing changes. Weights must not be written to inside; results are those of other
    kernels, and equal to rounding.
    """
    weights = list(module.parameters())
    fits = not torch.is_grad_enabled() and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    fits = fits and module._compiled_call_impl is None  # the compiler lays weights out itself, and guards classes
    fits = fits and all(hasattr(torch.ops.mkldnn, name) for name in _OPS)
    if not fits or any(w.device.type != "cpu" or w.dtype not in (torch.float32, torch.bfloat16) for w in weights):
        yield
        return
    changed = []
    for part in module.modules():
        if _hooked(part):
            continue
        if type(part) is nn.Conv2d and part.padding_mode == "zeros" and not isinstance(part.padding, str):
            changed.append((part, nn.Conv2d))
            part.__class__ = _PackedConv2d
        elif type(part) is nn.Linear and part.weight.dtype == torch.bfloat16:
            changed.append((part, nn.Linear))
            part.__class__ = _PackedLinear
    try:
        yield
    finally:
        for part, kind in changed:
            part.__class__ = kind
            part.__dict__.pop("_packed", None)


def _hooked(part: nn.Module) -> bool:
    """Something may change its weights before a call, as accelerate's dispatch does."""
    return bool(part._forward_pre_hooks or part._forward_hooks) or hasattr(part, "_hf_hook")
