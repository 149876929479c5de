"""The activations of the published transformers, by name."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

_SLOPE = 1.702


class _QuickGelu(torch.autograd.Function):
    """x * sigmoid(1.702 x) that keeps only x for the backward pass; written out, autograd would keep three tensors."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x * _SLOPE).sigmoid_().mul_(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        # d/dx x s(ax) = s + ax s (1 - s) is the derivative of silu at ax.
        return torch.ops.aten.silu_backward(grad, x * _SLOPE)


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's GELU, x * sigmoid(1.702 x). Their weights expect this one; the exact GELU lowers accuracy."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _QuickGelu.apply(x)
    return (x * _SLOPE).sigmoid_().mul_(x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
