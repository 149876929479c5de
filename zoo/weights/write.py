"""Weights -> one safetensors file, whole or not at all."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import WeightsError
from zoo.weights.atomic import atomic_file
from zoo.weights.safetensors_file import DTYPES, METADATA

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 64  # bytes; the first tensor starts at a multiple


def write(state: Mapping[str, Tensor], path: str | Path, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Writes name -> tensor as safetensors. The file is written aside, flushed and renamed: old or new, never half.

    Tensors may lie on any device and have any strides, and each is moved alone. Those that share memory are written
    once for each name, so that every reader finds every name. Values of `metadata` that are no text are written as
    JSON; `read_config` finds the entry "config".
    Raises DiskFull where there is no room, and WeightsError for what the format cannot hold.
    """
    names = sorted(state, key=lambda name: (-state[name].dtype.itemsize, name))  # so that each start is aligned
    header: dict[str, Any] = {}
    if metadata:
        header[METADATA] = {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    end = 0
    for name in names:
        tensor = state[name]
        if name == METADATA or tensor.dtype not in _NAMES or tensor.is_meta or tensor.layout != torch.strided:
            raise WeightsError(f"safetensors cannot hold {name!r}, a {tensor.layout} {tensor.dtype} on {tensor.device}")
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with atomic_file(path) as partial, open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(_bytes(state[name]))


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 1:  # contiguous() keeps whatever stride a single number has, and a view as bytes needs 1
        flat = flat.clone().as_strided((1,), (1,))
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")
