"""What a forward and backward pass keep in memory, counted on torch's `meta` device: no memory, no arithmetic.

Every tensor that is born is added and every one that dies is taken away, so the count is the peak as it would be, with
what is kept for the backward pass, what is computed again there, and what lives for a moment only.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from zoo.errors import SettingsError

COMPUTING = ("fp32", "autocast", "half")
# The operations of CLIP-like networks in the lists of PyTorch's documentation, "CUDA Ops that can autocast to ...".
_IN_HALF = frozenset("linear conv2d matmul __matmul__ __rmatmul__ bmm scaled_dot_product_attention".split())
_IN_SINGLE = frozenset("layer_norm group_norm softmax log_softmax cross_entropy nll_loss normalize norm exp".split())


def activation_bytes(
    model: nn.Module, batch: Mapping[str, Any], *, computing: str = "fp32", recompute: bool = False
) -> int:
    """The most that one micro-batch needs at a time, itself included, beyond the parameters and their gradients.

    `model` lies on meta, and so do the floating tensors of `batch`; whole numbers may have values, on the CPU, for a
    network that looks at them. `computing`: fp32, autocast (bf16 over fp32 weights, whose copies count), or half (all
    in bf16). `recompute`: as with checkpoint_activations. Raises SettingsError if the model cannot do that.
    """
    if recompute and not hasattr(model, "set_grad_checkpointing"):
        raise SettingsError(f"{type(model).__name__} has no set_grad_checkpointing(): plan without recomputing")
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(recompute)
    model.train().to(torch.bfloat16 if computing == "half" else torch.float32)
    given = [x for x in batch.values() if isinstance(x, Tensor)]
    held = [*model.parameters(), *model.buffers(), *given]
    drop = [p.register_post_accumulate_grad_hook(_drop) for p in model.parameters() if p.requires_grad]
    try:
        with _Kernels(computing == "autocast"), _Live(held) as live:
            loss = model(**batch)["loss"]
            # Not loss.backward(): while that runs, _Kernels would not see what is computed again.
            _engine_run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
            )
    finally:
        for handle in drop:
            handle.remove()
        model.float()
    return live.peak + sum(x.nbytes for x in given)


def largest_layer(model: nn.Module) -> int:
    """The parameters of the module that holds most by itself, as DeepSpeed's estimator for ZeRO-3 counts them."""
    return max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


class _Live(TorchDispatchMode):
    """Bytes of all storages that exist, each once, but for those `held` by others; and the most there ever were."""

    def __init__(self, held: list[Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in held}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


class _Attention(torch.autograd.Function):
    """Keeps what a fused kernel keeps: no T x T matrix, but a number per row (FlashAttention, Dao et al. 2022)."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, rows, _ = q.shape
        out = q.new_empty(batch, rows, heads, v.shape[-1]).transpose(1, 2)  # the layout that the kernels return
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _Kernels(TorchFunctionMode):
    """On meta, attention would be written out and autocast does nothing; here they are as on a device."""

    def __init__(self, autocast: bool):
        super().__init__()
        self.autocast = autocast

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if self.autocast and name in _IN_HALF | _IN_SINGLE:
            dtype = torch.bfloat16 if name in _IN_HALF else torch.float32
            args, kwargs = tree_map(lambda x: _cast(x, dtype), (args, kwargs))
        if name == "scaled_dot_product_attention":
            q, k, v = (*args, *(kwargs.pop(key) for key in ("query", "key", "value")[len(args) :]))[:3]
            return _Attention.apply(q, k, v)
        return func(*args, **kwargs)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
