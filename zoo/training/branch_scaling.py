"""Gradients in fp16 that are scaled for each residual branch by itself (Ramesh et al. 2021, section 2.4 and figure 4).

Deep in a transformer of 64 layers no one scale fits all: gradients fall below fp16 in some branches while they overflow
in others. bf16 has the range of fp32 and needs none of this; it is for hardware without bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import CheckpointError

START, LEAST, MOST = 2.0**13, 2.0**7, 2.0**24  # for one replica
GROWTH, DIVISOR = 2 ** (1 / 1000), 2**0.5
PATIENCE = 125  # updates from one division of a scale to the next


class BranchScaler:
    """A scale for each residual branch: x + last(...(first(x))).

    `branches`: the modules of each, from the one that reads the stream to the one whose output is added to it; they
    are hooked, so that a gradient that comes in is multiplied by the branch's scale, and one that goes out divided.
    What is not finite there goes out as 0: an overflow in one branch is no other's. `replicas`: how many gradients are
    summed. Between the backward pass and the optimizer's step call `unscale`, and leave the step out if it says False.
    """

    def __init__(self, branches: Sequence[Sequence[nn.Module]], replicas: int = 1):
        self.parameters = [[p for module in modules for p in module.parameters()] for modules in branches]
        self.scales = [START * replicas] * len(branches)
        self.waited = [PATIENCE] * len(branches)  # updates since a scale was divided
        self.bounds = LEAST * replicas, MOST * replicas
        for number, modules in enumerate(branches):
            modules[0].register_forward_pre_hook(lambda _, inputs, n=number: (self._out(inputs[0], n), *inputs[1:]))
            modules[-1].register_forward_hook(lambda _, inputs, output, n=number: self._in(output, n))

    def _in(self, output: Tensor, number: int) -> Tensor:
        return _Multiply.apply(output, self.scales[number])

    def _out(self, x: Tensor, number: int) -> Tensor:
        return _Divide.apply(x, self.scales[number])

    @torch.no_grad()
    def unscale(self) -> bool:
        """Divides the gradients of the branches' parameters; whether they all are finite. Then moves the scales."""
        finite = []
        for number, parameters in enumerate(self.parameters):
            gradients = [p.grad for p in parameters if p.grad is not None]
            finite.append(all(bool(torch.isfinite(gradient).all()) for gradient in gradients))
            torch._foreach_div_(gradients, self.scales[number])
        for number, good in enumerate(finite):
            self._move(number, good)
        return all(finite)

    def _move(self, number: int, good: bool) -> None:
        """A scale rises a little after each update that was finite, and falls at most once in PATIENCE updates."""
        scale = self.scales[number]
        self.waited[number] += 1
        if good:
            scale *= GROWTH
        elif self.waited[number] > PATIENCE:
            scale, self.waited[number] = scale / DIVISOR, 0
        least, most = self.bounds
        self.scales[number] = min(max(scale, least), most)

    def state_dict(self) -> dict[str, Any]:
        """What goes on with a run."""
        return {"scales": list(self.scales), "waited": list(self.waited)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises CheckpointError for that of another number of branches."""
        if len(state["scales"]) != len(self.scales):
            raise CheckpointError(
                f"{len(state['scales'])} gradient scales, for a model of {len(self.scales)} residual branches: "
                "choose a new run_folder"
            )
        self.scales, self.waited = list(state["scales"]), list(state["waited"])


class _Multiply(torch.autograd.Function):
    """Where a branch ends: its gradient comes in, in the stream's precision, and is scaled before it is rounded."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.dtype = scale, x.dtype
        return x.float()  # the stream is in fp32

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return (grad * ctx.scale).to(ctx.dtype), None


class _Divide(torch.autograd.Function):
    """Where a branch begins: its gradient goes out."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return torch.nan_to_num(grad.float() / ctx.scale, nan=0.0, posinf=0.0, neginf=0.0), None
