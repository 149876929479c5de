"""Parameter groups and the optimizer over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from zoo.errors import SettingsError

from .settings import Settings

DEFAULT_LR = 1e-3
Groups = list[dict[str, Any]]


def parameter_groups(model: nn.Module, weight_decay: float) -> Groups:
    """Matrices and kernels, which decay, and all below two dimensions (norms, biases, scalars), which does not.

    The rule of dimensions is nanoGPT's (karpathy/nanoGPT, configure_optimizers). Frozen parameters are in neither.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(
    model: nn.Module,
    settings: Settings,
    client: torch.optim.Optimizer | Callable[[nn.Module], Groups] | None,
    adamw: Callable[..., torch.optim.Optimizer] | None = None,
) -> torch.optim.Optimizer:
    """The client's optimizer; or AdamW over the groups of the client's function, or over ours. Raises SettingsError.

    `adamw` builds another AdamW than torch's, from groups and its keywords lr, betas, eps and weight_decay.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise SettingsError(
            "no parameter of the model requires a gradient, so there is nothing to train: unfreeze some"
        )
    if isinstance(client, torch.optim.Optimizer):
        _check_parameters(client, model.parameters())
        return client
    if client is not None and not callable(client):
        raise SettingsError(
            f"optimizer is a {type(client).__name__}: give a torch optimizer or a function model -> groups"
        )
    groups = client(model) if client else parameter_groups(model, settings.weight_decay)
    if adamw is None:
        # One kernel for the whole update instead of one per tensor; it serves CPUs and CUDA in floating point.
        fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
        adamw = partial(torch.optim.AdamW, fused=fused)
    optimizer = adamw(
        groups,
        lr=DEFAULT_LR if settings.lr is None else settings.lr,
        betas=tuple(settings.betas),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    _check_parameters(optimizer, model.parameters())
    return optimizer


def _check_parameters(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    known = {id(p) for p in parameters}
    strangers = sum(id(p) not in known for group in optimizer.param_groups for p in group["params"])
    if strangers:
        raise SettingsError(
            f"{strangers} of the optimizer's parameters are not the model's: build it from model.parameters() after "
            "the model is complete"
        )
