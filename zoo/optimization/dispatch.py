"""A model larger than its device: what does not fit waits in host memory, and comes when its layer runs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


def dispatch(model: nn.Module, memory: Mapping[int | str, int] | None = None) -> nn.Module:
    """The same model, in evaluation, spread over the GPUs and the host by accelerate; as it is where there is no GPU.

    memory: bytes by device, such as {0: 8 * 2**30, "cpu": 64 * 2**30}; None: what is free. The blocks of a tower, the
    entries of its ModuleLists, are never cut in two. Weights that were mapped from their file and not converted stay
    mapped on the host: the system reads them from the disk as layers ask for them, and memory may be smaller than they.
    """
    from accelerate import dispatch_model, infer_auto_device_map
    from accelerate.utils import get_max_memory

    room = dict(memory) if memory else get_max_memory()
    if not torch.cuda.is_available():
        return model
    room["cpu"] = max(room.get("cpu", 0), sum(p.numel() * p.element_size() for p in model.parameters()))
    whole = {type(part).__name__ for parts in model.modules() if isinstance(parts, nn.ModuleList) for part in parts}
    places = infer_auto_device_map(model, max_memory=room, no_split_module_classes=sorted(whole))
    return dispatch_model(model, places, main_device=min(place for place in room if isinstance(place, int)))
