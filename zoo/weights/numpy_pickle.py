"""A pickle of NumPy arrays in dicts, as JAX's projects publish weights -> tensors. Nothing in it is executed.

Source: numpy/_core/src/multiarray, methods.c (array_reduce, array_reduce_ex_picklebuffer) and descriptor.c
(arraydescr_reduce).
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo.errors import UnreadableWeights
from zoo.weights.pickle_records import Object
from zoo.weights.safe_pickle import named

_KINDS = re.compile("[fiu][1248]|b1")
_REBUILT = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
_BUFFERED = ("numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer")  # from protocol 5 on


def arrays(tree: Any) -> dict[str, Tensor]:
    """What `unpickle` gave -> the arrays in it as tensors, by dotted name. Raises UnreadableWeights."""
    return {name: _tensor(array) for name, array in named(tree, _is_array).items()}


def _is_array(value: Any) -> bool:
    return isinstance(value, Object) and value.name in _REBUILT + _BUFFERED


def _tensor(array: Object) -> Tensor:
    try:
        if array.name in _REBUILT:
            _version, shape, dtype, by_columns, data = array.state
        else:
            data, dtype, shape, order = array.args
            by_columns = order == "F"
        kind, order = dtype.args[0], dtype.state[1]
        sane = isinstance(data, (bytes, bytearray)) and all(type(n) is int and 0 <= n < 2**48 for n in shape)
        if not sane or order not in "<>|=" or not _KINDS.fullmatch(kind):
            raise TypeError(f"{kind!r} of {shape}")
        dtype = np.dtype(order + kind)
        if math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"{len(data)} bytes for {shape} of {kind}")
        numbers = np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C")
        return torch.from_numpy(numbers.astype(dtype.newbyteorder("="), order="C"))
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        raise UnreadableWeights(f"a damaged NumPy array, or one of no plain numbers: {error}") from error
