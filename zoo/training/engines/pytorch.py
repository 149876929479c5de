"""One process, one device: eager or compiled PyTorch, autocast over fp32 master weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from zoo import weights
from zoo.devices import find_device
from zoo.errors import CheckpointError, SettingsError, UnreadableWeights, WeightsMismatch

from .. import state_file
from ..optimizer import build_optimizer
from ..settings import Settings
from .base import to_device

ForwardStep = Callable[[Any, nn.Module], Mapping[str, Any]]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class PytorchEngine:
    """See `Engine`. With `trains=False` there is no optimizer, and only `evaluate` may be called."""

    def __init__(
        self, model: nn.Module, optimizer: Any, settings: Settings, forward_step: ForwardStep, *, trains: bool = True
    ):
        self.device = find_device(settings.pytorch_device)
        if settings.precision == "fp16" and self.device.type != "cuda":
            raise SettingsError(
                f"precision='fp16' needs a CUDA device, this run is on {self.device}: use 'bf16' or 'fp32'"
            )
        self.model, self.settings, self.forward_step = model.to(self.device), settings, forward_step
        self.callable = torch.compile(self.model) if settings.compile else self.model
        self.micro, self.grad_norm = 0, None
        if trains:
            _check_masters(model)
            self.optimizer = build_optimizer(model, settings, optimizer)
            self.group_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
            trained = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
            self.trained = [p for p in model.parameters() if id(p) in trained]
            self.optimizer.zero_grad(set_to_none=True)  # what the client's own use of the model may have left
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")

    def _precision(self) -> AbstractContextManager:
        if self.settings.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, _DTYPES[self.settings.precision])

    def forward(self, batch: Any) -> Mapping[str, Any]:
        with self._precision():
            return self.forward_step(to_device(batch, self.device), self.callable)

    @torch.no_grad()
    def evaluate(self, batch: Any) -> Mapping[str, Any]:
        return self.forward(batch)

    def backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise SettingsError("the loss depends on no parameter that is trained: unfreeze what it depends on")
        self.scaler.scale(loss / self.settings.gradient_accumulation_steps).backward()

    def step(self, lrs: Sequence[float]) -> bool:
        self.micro += 1
        if self.micro < self.settings.gradient_accumulation_steps:
            return False
        self.micro = 0
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.trained if p.grad is not None]
        self.grad_norm = get_total_norm(gradients)
        if self.settings.clip_grad:
            clip_grads_with_norm_(self.trained, self.settings.clip_grad, self.grad_norm)
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

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        own = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        with weights.atomic_folder(folder) as aside:
            weights.write(self.model.state_dict(), aside / "model.safetensors")
            state_file.write(own, aside, "optimizer")
            state_file.write(state, aside, "state")

    def load(self, folder: Path) -> dict[str, Any]:
        state = state_file.read(folder, "state")
        own = state_file.read(folder, "optimizer")
        try:
            found = weights.read(folder / "model.safetensors")
        except (OSError, UnreadableWeights) as error:
            raise CheckpointError(f"{folder}: {error}") from error
        try:
            self.model.load_state_dict(found)
        except RuntimeError as error:
            raise WeightsMismatch(f"{folder} is of another model: {error}. Choose a new run_folder") from error
        try:
            self.optimizer.load_state_dict(own["optimizer"])
        except ValueError as error:
            raise SettingsError(f"{folder} trained other parameters ({error}): choose a new run_folder") from error
        self.scaler.load_state_dict(own["scaler"])
        return state

    def export(self, path: Path) -> None:
        state = self.model.state_dict()
        weights.write({k: v.float() if v.is_floating_point() else v for k, v in state.items()}, path)


def _check_masters(model: nn.Module) -> None:
    half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if half:
        raise SettingsError(
            f"{half[0]} and {len(half) - 1} more trained parameters are not fp32: call model.float() first; "
            "precision='bf16' then computes in bf16 over fp32 weights"
        )
