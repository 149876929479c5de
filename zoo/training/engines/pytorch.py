"""One process, one device: eager or compiled PyTorch, autocast over fp32 master weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from zoo.devices import find_device
from zoo.errors import SettingsError

from ..launch import find_place
from ..optimizer import build_optimizer
from ..settings import Settings
from .base import (
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
from .restore import check_optimizer, check_weights, update_groups


class PytorchEngine:
    """See `Engine`. With `trains=False` there is no optimizer, and only `evaluate` may be called."""

    replicated, swaps = True, False

    @staticmethod
    def join(settings: Settings) -> None:
        """Raises SettingsError in one of several processes, which would all train the same, in the same folder."""
        if (place := find_place()) is not None and place.world_size > 1:
            raise SettingsError(
                f"env_type='pytorch' in one of {place.world_size} processes that {place.launcher} started: use "
                "env_type='pytorchDDP' or 'deepspeed', or 'auto' to have it follow from the launcher"
            )

    @staticmethod
    def build(make: Callable[[], nn.Module], settings: Settings) -> nn.Module:
        return make()

    def __init__(
        self, model: nn.Module, optimizer: Any, settings: Settings, forward_step: ForwardStep, *, trains: bool = True
    ):
        self.device = self._find_device(settings)
        self.model, self.settings = model.to(self.device), settings
        self.plain = self.wrapped = build_step(self.model, settings, forward_step, self.device)
        self.micro, self.grad_norm = 0, None
        if trains:
            check_masters(model)
            self.optimizer = build_optimizer(model, settings, optimizer)
            self.group_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
            trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            self.trained = {name: p for name, p in model.named_parameters() if id(p) in trained}
            self.optimizer.zero_grad(set_to_none=True)  # what the client's own use of the model may have left
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")

    def _find_device(self, settings: Settings) -> torch.device:
        return find_device(settings.pytorch_device)

    def forward(self, batch: Any) -> Mapping[str, Any]:
        return self.wrapped(to_device(batch, self.device))

    @torch.no_grad()
    def evaluate(self, batch: Any) -> Mapping[str, Any]:
        return self.plain(to_device(batch, self.device))

    def backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise SettingsError("the loss depends on no parameter that is trained: unfreeze what it depends on")
        self.scaler.scale(loss / self.settings.gradient_accumulation_steps).backward()
        self.micro += 1

    @property
    def due(self) -> bool:
        """Whether the gradients of a whole update are there."""
        return self.micro == self.settings.gradient_accumulation_steps

    def step(self, lrs: Sequence[float]) -> bool:
        if not self.due:
            return False
        self.micro = 0
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        self.grad_norm = get_total_norm([p.grad for p in self.trained.values() if p.grad is not None])
        if self.settings.clip_grad:
            clip_grads_with_norm_(self.trained.values(), self.settings.clip_grad, self.grad_norm)
        self._update()
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def _update(self) -> None:
        """The optimizer's step, unless a gradient is not finite: one bad batch must not spoil the weights."""
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.device.type == "cuda" and self.optimizer.defaults.get("fused"):
            # Fused optimizers read this flag on the device (torch/amp/grad_scaler.py sets it): no waiting for the GPU.
            self.optimizer.found_inf = (~torch.isfinite(self.grad_norm)).float()
            self.optimizer.step()
        elif torch.isfinite(self.grad_norm):
            self.optimizer.step()

    def layer_norms(self) -> dict[str, float]:
        scale = self.scaler.get_scale()
        return {name: float(p.grad.norm()) / scale for name, p in self.trained.items() if p.grad is not None}

    def figures(self) -> dict[str, float]:
        return {"loss_scale": self.scaler.get_scale()} if self.scaler.is_enabled() else {}

    # --- state -------------------------------------------------------------------------------------------------------
    def pieces(self) -> dict[str, dict[str, Piece]]:
        state = self.model.state_dict()
        found = {WEIGHTS: {name: _whole(state[name]) for name in dict.fromkeys(canonical_names(self.model).values())}}
        kinds = self._kinds()
        for name, parameter in self.trained.items():
            for kind, value in self.optimizer.state.get(parameter, {}).items():
                if kind in kinds:
                    found.setdefault(kind, {})[name] = _whole(value)
        return found

    def _kinds(self) -> set[str]:
        return tensor_kinds((p, self.optimizer.state.get(p, {})) for p in self.trained.values())

    def extra(self) -> dict[str, Any]:
        """`numbers`: what the optimizer holds of a parameter that is not of its shape, such as its count of steps."""
        kinds = self._kinds()
        numbers = {
            name: {kind: value for kind, value in held.items() if kind not in kinds}
            for name, parameter in self.trained.items()
            if (held := self.optimizer.state.get(parameter))
        }
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return {"numbers": numbers, "groups": groups, "scaler": self.scaler.state_dict()}

    def restore(self, source: Source) -> None:
        mine = self.pieces()[WEIGHTS]
        check_weights(source, mine)
        check_optimizer(source, self.trained)
        for name, piece in mine.items():
            source.fill(WEIGHTS, name, piece)
        numbers, state = source.engine["numbers"], {}
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        names = {id(p): name for name, p in self.trained.items()}
        for number, parameter in enumerate(order):
            name = names[id(parameter)]
            held = dict(numbers.get(name, {}))
            for kind in source.optimizer_kinds:
                if name in source.names(kind):
                    held[kind] = torch.empty_like(parameter)
                    source.fill(kind, name, _whole(held[kind]))
            if held:
                state[number] = held
        groups = self.optimizer.state_dict()["param_groups"]
        update_groups(groups, source.engine["groups"])
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if source.engine.get("scaler"):
            self.scaler.load_state_dict(source.engine["scaler"])

    def refresh(self) -> None:
        pass


def _whole(tensor: Tensor) -> Piece:
    return Piece(tensor.detach(), tuple(tensor.shape))
