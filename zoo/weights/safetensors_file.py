"""The safetensors format: eight bytes of length, a JSON header, then the tensors one after the other.

Read here and not by its package, so that each tensor can be given back to the system alone, and a full disk is an
OSError. Source: the format's README.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import UnreadableWeights
from zoo.weights.mapped import MappedFile, tensor_over

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
METADATA = "__metadata__"
MAX_HEADER = 100_000_000  # bytes, the format's own limit


def is_safetensors(start: bytes) -> bool:
    """Whether a file that starts with these nine bytes or more is in this format."""
    return len(start) > 8 and start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] <= MAX_HEADER


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header and the position of the first tensor's bytes. Raises UnreadableWeights where it is damaged."""
    with open(path, "rb") as file:
        start = file.read(9)
        if not is_safetensors(start):
            raise UnreadableWeights("no safetensors file")
        (length,) = struct.unpack("<Q", start[:8])
        text = start[8:] + file.read(length - 1)
    if len(text) < length:
        raise UnreadableWeights("truncated: it ends within its header; fetch it again")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableWeights(f"a damaged header ({error}); fetch it again") from error
    if not isinstance(header, dict):
        raise UnreadableWeights("a header that is no JSON object")
    return header, 8 + length


def read_safetensors(file: MappedFile) -> dict[str, Tensor]:
    """The tensors by name, over the pages of the file. Raises UnreadableWeights where header and file disagree."""
    header, data = read_header(file.path)
    header.pop(METADATA, None)
    end = 0
    state = {}
    for name, (dtype, size, first, last) in _rows(header):
        if first != end:
            raise UnreadableWeights(f"a damaged header: {name!r} overlaps another tensor or leaves a gap")
        end = last
        stride = tuple(math.prod(size[i + 1 :]) for i in range(len(size)))
        storage = file.storage(data + first, last - first, dtype.itemsize)
        state[name] = tensor_over(storage, dtype, 0, size, stride)
    if data + end != len(file):
        raise UnreadableWeights(f"{len(file) - data - end} bytes too many; fetch it again")
    return {name: state[name] for name in header}


def _rows(header: dict[str, Any]) -> list[tuple[str, tuple[torch.dtype, tuple[int, ...], int, int]]]:
    """Name, dtype, size, first and last byte of each tensor, in the order of their bytes."""
    rows = []
    for name, row in header.items():
        try:
            dtype, size, (first, last) = row["dtype"], tuple(row["shape"]), row["data_offsets"]
            sane = all(type(n) is int and 0 <= n < 2**48 for n in (*size, first, last))
        except (TypeError, ValueError, KeyError) as error:
            raise UnreadableWeights(f"a damaged header at {name!r}; fetch it again") from error
        if dtype not in DTYPES:
            raise UnreadableWeights(f"{name!r} has the dtype {dtype!r}, which torch lacks or zoo does not read")
        if not sane or last - first != math.prod(size) * DTYPES[dtype].itemsize:
            raise UnreadableWeights(f"a damaged header: {name!r} of size {size} in bytes {first} to {last}")
        rows.append((name, (DTYPES[dtype], size, first, last)))
    return sorted(rows, key=lambda row: row[1][2:])
