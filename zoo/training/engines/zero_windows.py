"""Which part of which parameter this rank holds in fp32 under ZeRO, and the optimizer's numbers for it.

DeepSpeed flattens parameters and cuts the result into equal parts; it keeps where each parameter went, for its own
checkpoints (deepspeed/utils/tensor_fragment.py, runtime/zero/stage3.py), and that is read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .base import Piece


@dataclass(frozen=True)
class Window:
    """`numel` numbers of a parameter from `start` on, which stand in this rank's part `group` from `at` on."""

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    group: int
    at: int

    def piece(self, flat: Tensor) -> Piece:
        """This rank's piece of the parameter, or of a state of the optimizer, in the flat tensor of its group."""
        return Piece(flat.detach().reshape(-1).narrow(0, self.at, self.numel), self.shape, self.start)


def untrained(tensor: Tensor, shape: tuple[int, ...], rank: int) -> Piece:
    """This rank's piece of a buffer, or of a parameter that is not trained, which stage 3 shards too."""
    if not hasattr(tensor, "ds_tensor"):
        return Piece(tensor.detach(), tuple(tensor.shape))
    size = tensor.partition_numel()
    numel = max(0, min(size, tensor.ds_numel - rank * size))
    return Piece(tensor.ds_tensor.detach().reshape(-1)[:numel], shape, rank * size)


class Unsharded:
    """Stage 0: every rank holds each parameter whole, as torch's optimizers do."""

    swaps, backed = False, frozenset()

    def __init__(self, optimizer: Any, trained: Mapping[str, nn.Parameter]):
        self.flats = list(trained.values())
        self.windows = [
            Window(name, tuple(p.shape), 0, p.numel(), number, 0) for number, (name, p) in enumerate(trained.items())
        ]

    @contextmanager
    def present(self, group: int, *, changes: bool = False) -> Iterator[Tensor]:
        """The weights of a parameter."""
        yield self.flats[group]

    def refresh(self) -> None:
        """They are what is computed with."""

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The averaged gradient."""
        return parameter.grad


class Stage12:
    """Stages 1 and 2 (deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer)."""

    swaps, backed = False, frozenset()

    def __init__(self, zero: Any, names: Mapping[int, str]):
        self.zero, self.flats = zero, zero.single_partition_of_fp32_groups
        self.windows = []
        for group, parameters in enumerate(zero.bit16_groups):
            for p in parameters:
                if (held := p._hp_mapping) is not None:
                    whole, part = held.lp_fragment_address, held.hp_fragment_address
                    shape = tuple(p.shape)
                    self.windows.append(Window(names[id(p)], shape, whole.start, whole.numel, group, part.start))

    @contextmanager
    def present(self, group: int, *, changes: bool = False) -> Iterator[Tensor]:
        """The flat fp32 weights of a group, in memory."""
        yield self.flats[group]

    def refresh(self) -> None:
        """Computes with the fp32 weights as they are now."""
        self.zero.update_lp_params()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """This rank's part of the averaged gradient, after the last backward and before the step."""
        held = parameter._hp_mapping
        return None if held is None else held.get_lp_grad_fragment(parameter._index_in_param_group)


class Stage3:
    """Stage 3 (deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3), offloaded or not.

    `backed` are the groups which partial offload leaves on the device, for a torch AdamW of its own.
    """

    def __init__(self, zero: Any, names: Mapping[int, str], shapes: Mapping[str, tuple[int, ...]], rank: int):
        self.zero, self.flats, self.swaps = zero, zero.fp32_partitioned_groups_flat, zero.swap_optimizer
        self.backed = _share_backup(zero)
        self.windows = []
        for p in (p for group in zero.fp16_groups for p in group):
            group, at, _ = zero.grad_position[zero.get_param_id(p)]
            size = p.partition_numel()
            numel = max(0, min(size, p.ds_numel - rank * size))
            if numel:
                name = names[id(p)]
                self.windows.append(Window(name, shapes[name], rank * size, numel, group, at))

    @contextmanager
    def present(self, group: int, *, changes: bool = False) -> Iterator[Tensor]:
        """The same; what lies on NVMe is brought in, and written back if it changes."""
        zero = self.zero
        if not zero._swappable_optimizer_subgroup(group):
            yield self.flats[group]
            return
        zero._optimizer_states_and_gradient_swap_in(group)
        yield self.flats[group]
        if changes:
            zero._reassign_or_swap_out_partitioned_parameters(group)
            zero._optimizer_states_and_gradient_swap_out(group)
        else:
            zero._release_swap_buffers(group)

    def refresh(self) -> None:
        zero = self.zero
        zero._partition_all_parameters()
        for group in range(len(self.flats)):
            if not zero._swappable_optimizer_subgroup(group):
                zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return self.zero.get_local_fp32_grad_for_param(parameter)


def _share_backup(zero: Any) -> frozenset[int]:
    """The groups that partial offload leaves on the device; their optimizer gets the states and rates of the other.

    By itself 0.19.8 keeps the rate of its first parameter group at what it was at the start, and its states apart,
    where no checkpoint would find them (`backup_optimizer` in stage3.py).
    """
    backup = getattr(zero, "backup_optimizer", None)
    if backup is None:
        return frozenset()
    for group in zero.optimizer.param_groups:
        for name, default in backup.defaults.items():
            group.setdefault(name, default)
    backup.param_groups, backup.state = zero.optimizer.param_groups, zero.optimizer.state
    return frozenset(number for number, place in zero.subgroup_to_device.items() if place != "cpu")
