"""A model built in pieces for ZeRO-3, so that no process ever holds the whole of it.

DeepSpeed's zero.Init cuts parameters into pieces, one for each rank, and joins them. As a context (0.19.8) it cuts
those of a module as soon as that is complete, and what is written to them later, such as weights scaled by depth or a
published checkpoint, is lost without a word. So here it only cuts and joins: torch's hooks say when a module is
complete, and whoever then touches a parameter finds it whole and as it was made, in fp32 and on the CPU, so that random
numbers are the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from zoo.errors import SettingsError

from .deepspeed_config import offload_of

# What can be answered from the shape alone, and what has nothing to do with the numbers.
_SIZES = {
    Tensor.shape.__get__,
    Tensor.ndim.__get__,
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.nelement,
    Tensor.__len__,
}
_NUMBERLESS = {
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad", "grad_fn", "is_leaf", "is_meta", "is_cuda")),
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "layout", "is_sparse", "is_quantized")),
    *(Tensor.requires_grad.__set__, Tensor.grad.__set__, Tensor.requires_grad_, Tensor.__hash__),
    *(Tensor.is_floating_point, Tensor.is_complex, torch.is_floating_point, torch.is_complex),
}


def is_cut(tensor: Tensor | None) -> bool:
    """Whether DeepSpeed has cut this parameter: its shape is in `ds_shape`, and torch's is that of nothing."""
    return hasattr(tensor, "ds_id")


def in_pieces(model: nn.Module) -> bool:
    """Whether the model, or a part of it, was built in pieces."""
    return any(is_cut(p) for p in model.parameters())


def check_stage(stage: int) -> None:
    """Raises SettingsError where a model in pieces is to be trained below ZeRO stage 3."""
    if stage < 3:
        raise SettingsError(
            f"the model was built in pieces, for ZeRO stage 3, and this is stage {stage}: build it anew"
        )


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape, of a cut parameter too."""
    return tuple(tensor.ds_shape if is_cut(tensor) else tensor.shape)


class WholeSizes(TorchFunctionMode):
    """Inside, cut parameters say the sizes that they have as a whole."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        cut = [x for x in tree_leaves((args, kwargs)) if isinstance(x, nn.Parameter) and is_cut(x)]
        if cut and func in _SIZES:
            return func(torch.empty(cut[0].ds_shape, device="meta"), *args[1:], **kwargs)
        if cut and func not in _NUMBERLESS:
            self.touch(cut)
        return func(*args, **kwargs)

    def touch(self, cut: list[nn.Parameter]) -> None:
        """Something is about to be done to the numbers of these."""


class _Workshop(WholeSizes):
    """Modules made inside are cut as they are complete. Those that are touched are whole until others are."""

    def __init__(self, init: Any):
        super().__init__()
        self.init, self.whole = init, []
        self.homes: dict[int, torch.device] = {}  # where a parameter was made, by its id

    def touch(self, cut: list[nn.Parameter]) -> None:
        if all(any(p is whole for whole in self.whole) for p in cut):
            return
        self.close()
        for parameter in {id(p): p for p in cut}.values():
            parameter.all_gather()
            parameter.data = parameter.data.to(self.homes[id(parameter)])
            self.whole.append(parameter)

    def close(self, *, anew: bool = False) -> None:
        """Cuts what is whole: into the pieces it had, or `anew`, where type and place are now others. Rank 0's numbers
        hold, as everywhere where ranks begin together."""
        for parameter in self.whole:
            parameter.data = parameter.data.detach().to(self.init.local_device).contiguous()
            dist.broadcast(parameter.data.view(-1).view(torch.uint8), 0)
            if anew or parameter.shape != parameter.ds_shape or parameter.dtype != parameter.ds_tensor.dtype:
                parameter.ds_shape, parameter.ds_numel = parameter.shape, parameter.numel()
                parameter.ds_tensor = None
            parameter.partition(has_been_updated=True)
        self.whole = []

    def cut(self, parameters: Iterable[nn.Parameter]) -> None:
        """Cuts those that are not yet."""
        for parameter in parameters:
            if is_cut(parameter):
                continue
            self.close()
            shape, self.homes[id(parameter)] = parameter.shape, parameter.device
            parameter.data = parameter.data.contiguous().view(-1)  # 0.19.8 cannot broadcast one without dimensions
            self.init._convert_to_zero_parameters([parameter])
            parameter.ds_shape = shape

    @contextmanager
    def open(self) -> Iterator[None]:
        """Modules made in this block are cut."""
        handles = (
            torch_module.register_module_module_registration_hook(self._on_module),
            torch_module.register_module_parameter_registration_hook(self._on_parameter),
        )
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_module(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if child is not None:
            with torch._C.DisableTorchFunction():
                self.cut(child.parameters())

    def _on_parameter(self, parent: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """A module that is complete gets another parameter: that of a checkpoint, or of another module."""
        if parameter is not None and is_cut(parent._parameters.get(name)):
            with torch._C.DisableTorchFunction():
                self.cut([parameter])


def build_in_pieces(
    deepspeed: Any, make: Callable[[], nn.Module], config: dict[str, Any], dtype: torch.dtype | None
) -> nn.Module:
    """make(), whose parameters are cut as it goes, and lie where `config` says at the end, in `dtype` (None: as made).

    Until then the pieces, 1 / N of each parameter in each of N processes, are in fp32, and on the CPU if the optimizer
    will be: in memory that is not pinned, for torch never gives such back.
    """
    deepspeed.init_distributed(dist_init_required=False)
    # Only with a module does it take the linear layer that does not keep joined weights for the backward pass.
    init = deepspeed.zero.Init(module=nn.Module(), config_dict_or_path=config)
    place = init.remote_device, init.pin_memory
    if offload_of(config, "optimizer") != "none":
        init.remote_device = "cpu"
    init.pin_memory = False
    workshop = _Workshop(init)
    with workshop.open():
        model = make()
    workshop.cut(model.parameters())
    workshop.close()
    if dtype is None and place == (init.remote_device, init.pin_memory):
        return model
    init.remote_device, init.pin_memory = place
    for parameter in model.parameters():
        workshop.touch([parameter])
        parameter.data = parameter.data.to(dtype if parameter.is_floating_point() else None)
        workshop.close(anew=True)
    return model


def place_rest(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> None:
    """What is not cut of a model in pieces, moved: DeepSpeed takes such a model to be placed already."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not is_cut(tensor):
            computing = dtype if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() else None
            tensor.data = tensor.data.to(device, computing)
