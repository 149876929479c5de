"""The start of DeepSpeed's engine over a module and an optimizer."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn


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
