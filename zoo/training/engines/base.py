"""The seam between the loop and what runs one training step. Every rank calls every method."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from zoo.errors import SettingsError

from ..settings import Settings

ForwardStep = Callable[[Any, nn.Module], Mapping[str, Any]]
WEIGHTS, EMA = "weights", "ema"
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a tensor of `shape`: `values`, which stand at `start` of it when it is flat.

    A whole tensor is a piece too. `values` are the engine's own memory where that is possible: what is written into
    them and then announced by `Engine.refresh` is trained on.
    """

    values: Tensor
    shape: tuple[int, ...]
    start: int = 0

    @property
    def is_whole(self) -> bool:
        return self.values.numel() == math.prod(self.shape)


class Source(Protocol):
    """Where `Engine.restore` finds the numbers: tensors by kind and name, whatever engine wrote them."""

    optimizer_kinds: set[str]
    engine: dict[str, Any]

    def names(self, kind: str) -> set[str]:
        """The tensors there are of this kind."""

    def fill(self, kind: str, name: str, piece: Piece) -> None:
        """Copies this rank's part of the tensor into the piece. Raises WeightsMismatch if its shape is another."""


class Engine(Protocol):
    """One training step, cut as the pickiest backend (DeepSpeed) wants it; the others imitate it cheaply.

    Built with (model, optimizer, settings, forward_step, trains=True): `optimizer` is the client's or None, see
    `build_optimizer`; forward_step(batch, model) is the client's forward; with trains=False only `evaluate` is called.
    `join(settings)` makes this process one of the run's ranks, before anything asks which rank it is;
    `build(make, settings)` then gives what make() does, as this engine wants it built; see `Trainer.build`.
    `model` is the client's module; `device` is where it is; `group_lrs` are the rates of the parameter groups at the
    start; `grad_norm` is the norm before clipping at the last update, a tensor of no dimension, or None before it;
    `trained` are the parameters that the optimizer has, by name; `replicated` says that every rank holds the whole
    state, so that one of them may write each tensor; `swaps` that what `pieces` gives are copies, for it lies on NVMe;
    `due` that the next `step` makes an update.
    """

    model: nn.Module
    device: torch.device
    group_lrs: list[float]
    grad_norm: Tensor | None
    optimizer: torch.optim.Optimizer
    trained: dict[str, nn.Parameter]
    replicated: bool
    swaps: bool
    due: bool

    def forward(self, batch: Any) -> Mapping[str, Any]:
        """Moves the batch and runs the client's forward step in the run's precision. Owns DDP's no_sync."""

    def evaluate(self, batch: Any) -> Mapping[str, Any]:
        """As forward, without gradients and without counting as a micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of loss / accumulated micro-batches."""

    def step(self, lrs: Sequence[float]) -> bool:
        """Called per micro-batch. True when an accumulated update was due, and was made at these rates, one per group.

        An update whose gradients are not finite is left out, on every rank; it was due all the same.
        """

    def pieces(self) -> dict[str, dict[str, Piece]]:
        """The state by kind and name: "weights" (parameters in fp32, and buffers), and the optimizer's kinds, such as
        "exp_avg", whose tensors have the shape of the parameter of that name."""

    def extra(self) -> dict[str, Any]:
        """What else the engine must know to go on: small, the same for every engine where it means the same."""

    def restore(self, source: Source) -> None:
        """Takes over what another engine, or this one, left. Raises CheckpointError, WeightsMismatch."""

    def refresh(self) -> None:
        """The weights' pieces were written to: from now on the model computes with them."""

    def layer_norms(self) -> dict[str, float]:
        """The norm of each parameter's gradient at the update that is due, on all ranks together; before `step`."""

    def figures(self) -> dict[str, float]:
        """What only the engine can say of the updates since the last call, for the log, such as its loss scale."""


class Step(nn.Module):
    """The client's forward step as a module: what wraps it sees every parameter, and the client sees its own model.

    `precision`: float16 or bfloat16 computes under autocast, which stands inside because DeepSpeed switches off what
    is outside of it.
    """

    def __init__(
        self, model: nn.Module, forward_step: ForwardStep, precision: torch.dtype | None, compile: bool, device: str
    ):
        super().__init__()
        self.model, self.forward_step = model, forward_step
        self.precision, self.device = precision, device
        # Not a submodule: what it holds is the model's.
        self.__dict__["called"] = torch.compile(model) if compile else model

    def forward(self, batch: Any) -> Mapping[str, Any]:
        if self.precision is None:
            return self.forward_step(batch, self.called)
        with torch.autocast(self.device, self.precision):
            return self.forward_step(batch, self.called)


def build_step(model: nn.Module, settings: Settings, forward_step: ForwardStep, device: torch.device) -> Step:
    """The step in the run's precision. Raises SettingsError where the device has no fp16."""
    if settings.precision == "fp16" and device.type != "cuda":
        raise SettingsError(f"precision='fp16' needs a CUDA device, this run is on {device}: use 'bf16' or 'fp32'")
    return Step(model, forward_step, DTYPES[settings.precision], settings.compile, device.type)


def check_masters(model: nn.Module) -> None:
    """Raises SettingsError for weights in half precision: updates would be rounded away."""
    half = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32]
    if half:
        raise SettingsError(
            f"{half[0]} and {len(half) - 1} more trained parameters are not fp32: call model.float() first; "
            "precision='bf16' then computes in bf16 over fp32 weights"
        )


def canonical_names(model: nn.Module) -> dict[str, str]:
    """Every name in the model's state -> the first name of the same tensor: tied weights are kept once."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}


def tensor_kinds(states: Iterable[tuple[Tensor, Mapping[str, Any]]]) -> set[str]:
    """What an optimizer holds in the shape of a parameter. A parameter without dimensions cannot tell: its moments look
    like its count of steps, so that the others say for it."""
    return {
        kind
        for parameter, state in states
        for kind, value in state.items()
        if isinstance(value, Tensor) and value.dim() and value.shape == parameter.shape
    }


def to_device(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Every tensor in nested dicts, lists and tuples, moved; those in fp32 become `dtype`, if it is given."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.dtype == torch.float32 else None, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device, dtype) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        moved = [to_device(item, device, dtype) for item in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value
