"""The start of DeepSpeed's engine over a module and an optimizer."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from zoo.errors import MissingPackage, SettingsError

from ..optimizer import build_optimizer
from ..settings import Settings
from .deepspeed_config import half_states, offload_of
from .extensions import wait_for_builds

logger = logging.getLogger("zoo.training")


def initialize(deepspeed: Any, step: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]) -> Any:
    """DeepSpeed's engine. Version 0.19.8 cannot broadcast a parameter without dimensions, such as CLIP's temperature.

    At stage 3 those get one, for good; below, they are broadcast here and marked as what it leaves alone.
    """
    scalars = [p for p in step.parameters() if p.dim() == 0]
    for parameter in scalars:
        if config["zero_optimization"]["stage"] == 3:
            parameter.data = parameter.data.view(1)
        else:
            dist.broadcast(parameter.data, 0)
            parameter.ds_optim_param = True
    try:
        return deepspeed.initialize(model=step, optimizer=optimizer, config=config, dist_init_required=False)[0]
    finally:
        for parameter in scalars:
            vars(parameter).pop("ds_optim_param", None)


def choose_optimizer(deepspeed: Any, model: nn.Module, client: Any, settings: Settings, config: dict[str, Any]) -> Any:
    """The client's, or AdamW: DeepSpeed's for the CPU where the optimizer is offloaded.

    Raises SettingsError, and MissingPackage where only DeepSpeed's will do and it cannot be built.
    """
    offload = offload_of(config, "optimizer")
    if offload == "none":
        return build_optimizer(model, settings, client)
    DeepSpeedCPUAdam = deepspeed.ops.adam.DeepSpeedCPUAdam
    if isinstance(client, torch.optim.Optimizer):
        if not isinstance(client, DeepSpeedCPUAdam):
            raise SettingsError(
                f"deepspeed_config offloads the optimizer to {offload}, and train() was given a "
                f"{type(client).__name__}, which would run slowly there: pass optimizer=None, or a function model -> "
                "parameter groups, and the engine takes DeepSpeedCPUAdam over them"
            )
        return build_optimizer(model, settings, client)
    wait_for_builds(("cpu_adam",))
    try:
        words = {"adamw_mode": True, "fp32_optimizer_states": not half_states(config)}
        return build_optimizer(model, settings, client, partial(DeepSpeedCPUAdam, **words))
    except (RuntimeError, OSError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        if half_states(config) or config["zero_optimization"]["offload_optimizer"].get("ratio", 1.0) != 1.0:
            raise MissingPackage(
                "deepspeed_config offloads a part of the optimizer, or keeps it in bf16, which only DeepSpeedCPUAdam "
                f"can, and it cannot be built here ({first}): install g++ and ninja"
            ) from error
        logger.warning(
            "DeepSpeedCPUAdam cannot be built here (%s), so torch's AdamW runs on the CPU, to the same weights but "
            "more slowly: install g++ and ninja",
            first,
        )
        config["zero_force_ds_cpu_optimizer"] = False
        return build_optimizer(model, settings, client)
