"""DeepSpeed: ZeRO stages 0 to 3, with what does not fit the device on the CPU or on NVMe.

What is peculiar to DeepSpeed stands here and in the files beside this one that name it or ZeRO.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from zoo import distributed
from zoo.errors import MissingPackage, SettingsError

from ..settings import Settings
from . import process_group
from .base import (
    DTYPES,
    WEIGHTS,
    ForwardStep,
    Piece,
    Source,
    build_step,
    canonical_names,
    check_masters,
    tensor_kinds,
    to_device,
)
from .deepspeed_config import build_config, offload_of, prepare_nvme
from .deepspeed_start import choose_optimizer, initialize
from .extensions import wait_for_builds
from .restore import check_optimizer, check_weights, update_groups
from .sharded import WholeSizes, build_in_pieces, check_stage, in_pieces, place_rest, whole_shape
from .waited import Waited
from .zero_windows import Stage3, Stage12, Unsharded, Window, untrained

logger = logging.getLogger("zoo.training")


class DeepspeedEngine:
    """See `Engine`. `precision="bf16"` keeps bf16 weights beside ZeRO's fp32 ones, takes pictures in bf16, and computes
    under autocast, so that losses are in fp32."""

    @staticmethod
    def join(settings: Settings) -> None:
        process_group.join(settings)

    @staticmethod
    def build(make: Callable[[], nn.Module], settings: Settings) -> nn.Module:
        config = build_config(settings, distributed.world_size())
        if config["zero_optimization"]["stage"] < 3:
            return make()
        if offload_of(config, "param") == "nvme":
            logger.warning("each process builds the model whole: what goes to NVMe cannot be built in pieces")
            return make()
        deepspeed = _import_deepspeed(process_group.local_device(settings))
        return build_in_pieces(deepspeed, make, config, DTYPES[settings.precision])

    def __init__(
        self, model: nn.Module, optimizer: Any, settings: Settings, forward_step: ForwardStep, *, trains: bool = True
    ):
        self.device, self.model, self.settings = process_group.local_device(settings), model, settings
        self.micro, self.grad_norm = 0, None
        step = build_step(model, settings, forward_step, self.device)
        pieces = in_pieces(model)
        if not trains:
            if pieces and not hasattr(model, "ds_id"):  # that of DeepSpeed's hooks, which join the pieces
                raise SettingsError(
                    "the model was built in pieces, which are joined once it trains: call train() first"
                )
            self.ds = step.to(self.device)
            return
        config = build_config(settings, distributed.world_size())
        deepspeed = _import_deepspeed(self.device)
        self.stage = config["zero_optimization"]["stage"]
        self.replicated = self.stage == 0
        if pieces:
            check_stage(self.stage)
            place_rest(step, self.device, DTYPES[settings.precision])
        else:
            check_masters(model)
        if self.stage < 3:
            step.to(self.device)
        names = {id(p): name for name, p in model.named_parameters()}
        self.shapes = {name: whole_shape(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
        self.order = canonical_names(model)
        with WholeSizes():
            self.optimizer = choose_optimizer(deepspeed, model, optimizer, settings, config)
        self.group_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        self.trained = {name: p for name, p in model.named_parameters() if id(p) in trained}
        sizes = [math.prod(self.shapes[name]) for name in self.trained]
        if prepare_nvme(config, settings, sizes, distributed.world_size()):
            _check_nvme()
        self.ds = initialize(deepspeed, step, self.optimizer, config)
        self.zero = self._find_windows(names)
        self.waited = Waited(deepspeed.comm.comm.cdb, self.device)
        self.swaps = self.zero.swaps

    def _find_windows(self, names: Mapping[int, str]) -> Stage12 | Stage3 | Unsharded:
        if not self.stage:
            return Unsharded(self.optimizer, self.trained)
        # Updates that are not finite are left out. In fp32 the norm says which; otherwise DeepSpeed has to look at each
        # gradient before it judges the norm, which a file may not switch off.
        self.ds.optimizer.check_grad_overflow = self.settings.precision != "fp32"
        if self.stage == 3:
            return Stage3(self.ds.optimizer, names, self.shapes, distributed.rank())
        return Stage12(self.ds.optimizer, names)

    def forward(self, batch: Any) -> Mapping[str, Any]:
        return self.ds(to_device(batch, self.device, DTYPES[self.settings.precision]))

    @torch.no_grad()
    def evaluate(self, batch: Any) -> Mapping[str, Any]:
        # Its own mode alone, not the modules' below, which the caller has set.
        before, self.ds.training = self.ds.training, False
        try:
            return self.forward(batch)
        finally:
            self.ds.training = before

    def backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise SettingsError("the loss depends on no parameter that is trained: unfreeze what it depends on")
        self.ds.backward(loss)  # which divides by the accumulated micro-batches
        self.micro += 1
        self.waited.updates += self.due

    @property
    def due(self) -> bool:
        """Whether the gradients of a whole update are there."""
        return self.micro == self.settings.gradient_accumulation_steps

    def step(self, lrs: Sequence[float]) -> bool:
        due = self.due
        if due:
            self.micro = 0
            for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr
            if not self.stage:
                self._clip_unsharded()
        self.ds.step()  # which counts micro-batches
        if due and self.stage:
            self.grad_norm = torch.as_tensor(self.ds.get_global_grad_norm(), device=self.device).float()
        return due

    def _clip_unsharded(self) -> None:
        """Without ZeRO, DeepSpeed neither says the norm nor leaves out what is not finite."""
        self.grad_norm = get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])
        if not torch.isfinite(self.grad_norm):
            for parameter in self.trained.values():
                parameter.grad = None
        elif self.settings.clip_grad:
            clip_grads_with_norm_(self.trained.values(), self.settings.clip_grad, self.grad_norm)

    def layer_norms(self) -> dict[str, float]:
        squares = torch.zeros(len(self.trained), device=self.device)
        for number, parameter in enumerate(self.trained.values()):
            gradient = self.zero.gradient(parameter)
            if gradient is not None:
                squares[number] = gradient.float().square().sum()
        if not self.replicated:
            dist.all_reduce(squares)
        return dict(zip(self.trained, squares.sqrt().tolist(), strict=True))

    def figures(self) -> dict[str, float]:
        found = {"loss_scale": float(self.ds.optimizer.cur_scale)} if self.settings.precision == "fp16" else {}
        return found | self.waited.figures()

    # --- state -------------------------------------------------------------------------------------------------------
    def _unsharded(self) -> dict[str, Piece]:
        """Without ZeRO, everything; with it, what no optimizer has."""
        state, trained = self.model.state_dict(keep_vars=True), self.trained if self.stage else ()
        names = [name for name in dict.fromkeys(self.order.values()) if name not in trained]
        return {name: untrained(state[name], self.shapes[name], distributed.rank()) for name in names}

    def pieces(self) -> dict[str, dict[str, Piece]]:
        mine = {}
        for name, piece in self._unsharded().items():
            if self.replicated or not piece.is_whole or distributed.rank() == 0:
                mine[name] = piece
        found, kinds = {WEIGHTS: mine}, self._kinds()
        for window, flat, state in self._windows():
            if self.stage:
                found[WEIGHTS][window.name] = self._kept(window, flat)
            for kind, value in state.items():
                if kind in kinds:
                    found.setdefault(kind, {})[window.name] = self._kept(window, value)
        return found

    def _windows(self, changes: bool = False):
        """Every window with its flat weights and its optimizer's state, while these are in memory."""
        for group in range(len(self.zero.flats)):
            with self.zero.present(group, changes=changes) as flat:
                state = self.optimizer.state.setdefault(flat, {}) if changes else self.optimizer.state.get(flat, {})
                for window in self.zero.windows:
                    if window.group == group:
                        yield window, flat, state

    def _kinds(self) -> set[str]:
        return tensor_kinds((flat, state) for _, flat, state in self._windows())

    def _kept(self, window: Window, flat: Tensor) -> Piece:
        piece = window.piece(flat)
        return Piece(piece.values.clone(), piece.shape, piece.start) if self.zero.swaps else piece

    def extra(self) -> dict[str, Any]:
        numbers, kinds = {}, self._kinds()
        for window, _, state in self._windows():
            held = {kind: value for kind, value in state.items() if kind not in kinds}
            if held:
                numbers[window.name] = held
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        scale = float(self.ds.optimizer.cur_scale) if self.settings.precision == "fp16" else None
        return {"numbers": numbers, "groups": groups, "scaler": {"scale": scale}}

    def restore(self, source: Source) -> None:
        check_weights(source, self.order.values())
        check_optimizer(source, self.trained)
        for name, piece in self._unsharded().items():
            source.fill(WEIGHTS, name, piece)
        numbers, kinds = source.engine["numbers"], source.optimizer_kinds
        for window, flat, state in self._windows(changes=True):
            if self.stage:
                source.fill(WEIGHTS, window.name, window.piece(flat))
            for kind in kinds:
                if kind not in state:
                    state[kind] = torch.zeros_like(flat, requires_grad=False)
                source.fill(kind, window.name, window.piece(state[kind]))
            for kind, value in numbers.get(window.name, {}).items():
                state[kind] = self._as_counted(kind, value, window.group)
        update_groups(self.optimizer.param_groups, source.engine["groups"])
        scale = (source.engine.get("scaler") or {}).get("scale")
        if scale and self.settings.precision == "fp16":
            self.ds.optimizer.cur_scale = scale
        self.refresh()

    def _as_counted(self, kind: str, value: Any, group: int) -> Any:
        """torch's optimizers count their steps in a tensor, DeepSpeed's in an int."""
        if kind != "step":
            return value
        torchs = type(self.optimizer).__module__.startswith("torch.") or group in self.zero.backed
        return torch.tensor(float(value)) if torchs else int(value)

    def refresh(self) -> None:
        self.zero.refresh()


def _import_deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    here = str(Path(sys.executable).parent)  # where pip put ninja, which builds its kernels
    if here not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), here])
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise MissingPackage("env_type='deepspeed' needs the package deepspeed: pip install deepspeed") from error
    deepspeed.utils.logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*deprecated", category=FutureWarning, module="torch.distributed")
    # Only its inference uses this one; every start would build it, and leave 69 MB per rank in shared memory.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _check_nvme() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    wait_for_builds(("async_io",))
    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise MissingPackage("offloading to NVMe needs libaio: apt install libaio-dev (or libaio-devel), and g++")
