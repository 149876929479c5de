"""Weights laid out once as the CPU's kernels want them, for many calls of one network.

oneDNN computes convolutions on weights in blocks. Torch keeps them in rows and reorders them at every call, which for
small maps of many channels takes longer than the convolution: at 8 x 8 places of 1,280 channels half of the time in
fp32, and two thirds in bf16. Torch's compiler avoids it by the same two functions that are used here. In fp32, wide
3x3 convolutions take Winograd's algorithm instead, in 0.5 to 0.8 of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from zoo.blocks import winograd
from zoo.devices import free_memory

_OPS = ("_reorder_convolution_weight", "_convolution_pointwise", "_reorder_linear_weight", "_linear_pointwise")
WINOGRAD_CHANNELS, WINOGRAD_PLACES = 256, 64  # below, what it saves is lost in the transforms
WINOGRAD_SIZE = 16 / 9  # of its weights over those of the layer
SPARE = 1.25  # so many times what the copies take must be free


class _PackedConv2d(nn.Conv2d):
    """A convolution with a copy of its weight for the kernel that is fastest at the size of the first input. Channels
    lie side by side in what it gives, so that the layers after it find them so."""

    _packed: Tensor | None = None
    _winograd = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        x = x.contiguous(memory_format=torch.channels_last)
        how = list(self.padding), list(self.stride), list(self.dilation), self.groups
        if self._packed is None:
            self._winograd = is_wide(self) and x.shape[-2:].numel() >= WINOGRAD_PLACES
            self._packed = (
                winograd.transform(self.weight)
                if self._winograd
                else torch.ops.mkldnn._reorder_convolution_weight(self.weight, *how, list(x.shape))
            )
        if self._winograd:
            return winograd.convolve(x, self._packed, self.bias)
        return torch.ops.mkldnn._convolution_pointwise(x, self._packed, self.bias, *how, "none", [], "")


class _PackedLinear(nn.Linear):
    """A linear layer with a copy of its weight in blocks."""

    _packed: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D')."""
        if self._packed is None:
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, x.numel() // x.shape[-1])
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def is_wide(conv: nn.Conv2d) -> bool:
    """Whether Winograd's algorithm computes it, and faster."""
    fits = conv.kernel_size == (3, 3) and conv.padding == conv.stride == conv.dilation == (1, 1)
    narrowest = min(conv.in_channels, conv.out_channels)
    return fits and conv.groups == 1 and conv.weight.dtype == torch.float32 and narrowest >= WINOGRAD_CHANNELS


@contextmanager
def packed(module: nn.Module) -> Iterator[None]:
    """Inside, the convolutions of `module`, and in bf16 its linear layers, keep their weights a second time, in blocks.

    For inference on a CPU with room for the copies: elsewhere nothing changes. Weights must not be written to inside;
    results are those of other kernels, and equal to rounding.
    """
    weights = list(module.parameters())
    fits = not torch.is_grad_enabled() and torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    fits = fits and module._compiled_call_impl is None  # the compiler lays weights out itself, and guards classes
    fits = fits and all(hasattr(torch.ops.mkldnn, name) for name in _OPS)
    if not fits or any(w.device.type != "cpu" or w.dtype not in (torch.float32, torch.bfloat16) for w in weights):
        yield
        return
    kinds: dict[nn.Module, type[nn.Module]] = {}
    for part in module.modules():
        if _hooked(part):
            continue
        if type(part) is nn.Conv2d and part.padding_mode == "zeros" and not isinstance(part.padding, str):
            kinds[part] = _PackedConv2d
        elif type(part) is nn.Linear and part.weight.dtype == torch.bfloat16:
            kinds[part] = _PackedLinear
    copies = sum(
        part.weight.nbytes * (WINOGRAD_SIZE if kind is _PackedConv2d and is_wide(part) else 1)
        for part, kind in kinds.items()
    )
    if copies * SPARE > free_memory():
        kinds = {}
    for part, kind in kinds.items():
        part.__class__ = kind
    try:
        yield
    finally:
        for part, kind in kinds.items():
            part.__class__ = kind.__base__
            part.__dict__.pop("_packed", None)
            part.__dict__.pop("_winograd", None)


def _hooked(part: nn.Module) -> bool:
    """Something may change its weights before a call, as accelerate's dispatch does."""
    return bool(part._forward_pre_hooks or part._forward_hooks) or hasattr(part, "_hf_hook")
