"""What a pickle may ask for, and what it gets: plain values and four records. No class is looked up, none is called.

Sources: torch/_utils.py and torch/serialization.py for what torch.save asks for, torch/jit/_pickle.py for TorchScript.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from zoo.errors import UnreadableWeights, UnsafePickle

MAX_NAME = 1000  # letters; a name is repeated below each of its children
MAX_DIMENSIONS = 64  # as in torch


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function. Only the name."""

    name: str

    def __post_init__(self) -> None:
        if len(self.name) > MAX_NAME:
            raise UnsafePickle(f"the pickle names something of {len(self.name)} letters")


@dataclass(slots=True, eq=False)
class Object:
    """An instance of a class that is never looked up: its attributes and, of a dict or list, its items. `args`: what it
    was to be made from."""

    name: str
    state: Any = None
    items: dict = field(default_factory=dict)
    args: tuple = ()


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A run of `count` elements that the file keeps elsewhere under `key`. dtype None: plain bytes."""

    key: str
    dtype: str | None
    count: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor before it is built: offset, size and stride in elements of `dtype`, not yet held against the storage."""

    storage: StorageRef
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


STORAGE_DTYPES = {
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": None,
}
_STORAGE_MODULES = ("torch", "torch.cuda", "torch.storage")


def is_name(key: Any) -> bool:
    """Whether a dictionary key can be part of a tensor's name. Others are dropped, so that no tuple is ever hashed."""
    if isinstance(key, (str, int)):
        return len(key) <= MAX_NAME if isinstance(key, str) else abs(key) < 2**63
    return key is None or isinstance(key, (float, Global))


def as_dict(pairs: Any = ()) -> dict:
    """Pairs of key and value -> a dict of those whose key is a name."""
    return {key: value for key, value in pairs if is_name(key)}


def persistent(identity: Any) -> Any:
    """A persistent id, ("storage", class, key, location, count) -> StorageRef. The location is not followed."""
    if isinstance(identity, tuple) and len(identity) == 4 and identity[0] == "module":
        return identity[1]  # modules pickled before the zip format wrap their classes like this
    if not isinstance(identity, tuple) or len(identity) < 5 or identity[0] != "storage":
        raise UnsafePickle("the pickle refers to something outside itself that is no storage")
    _, cls, key, _location, count, *view = identity
    module, _, kind = cls.name.rpartition(".") if isinstance(cls, Global) else ("", "", "")
    if module not in _STORAGE_MODULES or kind not in STORAGE_DTYPES:
        raise UnreadableWeights(f"a storage of the unknown kind {module}.{kind}")
    if not isinstance(key, str) or not re.fullmatch("[0-9]{1,20}", key):
        raise UnsafePickle(f"the storage key {key[:80] if isinstance(key, str) else ''!r} is no number")
    if any(part is not None for part in view):
        raise UnreadableWeights("a storage that is a view of another one; save the weights again with a newer torch")
    return StorageRef(key, STORAGE_DTYPES[kind], *_naturals([count]))


def _naturals(values: Any) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or len(values) > MAX_DIMENSIONS:
        raise UnreadableWeights("a tensor's size or stride is no row of numbers")
    if any(type(value) is not int or not 0 <= value < 2**63 for value in values):
        raise UnreadableWeights("a tensor's offset, size or stride is negative or no number")
    return tuple(values)


def _tensor(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> TensorRef:
    if not isinstance(storage, StorageRef) or storage.dtype is None:
        raise UnreadableWeights("a tensor without a typed storage")
    return _tensor_of(storage, offset, size, stride, requires_grad, hooks, Global(f"torch.{storage.dtype}"), metadata)


def _tensor_of(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None) -> TensorRef:
    if not isinstance(storage, StorageRef) or not isinstance(dtype, Global):
        raise UnreadableWeights("a tensor without a storage or a dtype")
    if metadata:  # the marks of torch.conj and torch.neg views: the stored numbers are not the tensor's
        raise UnreadableWeights("a tensor that is a lazy conjugate or negative; save it resolved")
    return TensorRef(
        storage, dtype.name.removeprefix("torch."), *_naturals([offset]), _naturals(size), _naturals(stride)
    )


def _first(value: Any = (), *_: Any) -> Any:
    return value


# Each takes the pickled arguments.
ALLOWED: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.Size": _first,
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.jit._pickle.restore_type_tag": _first,
    "collections.OrderedDict": as_dict,
}
# Hyper-parameters and Lightning's callbacks hold values that are no weights. An inert object stands for each.
INERT = frozenset(
    "torch.device torch.serialization._get_layout numpy.dtype numpy.core.multiarray.scalar "
    "numpy.core.multiarray._reconstruct numpy._core.multiarray.scalar numpy._core.multiarray._reconstruct "
    "numpy.core.numeric._frombuffer numpy._core.numeric._frombuffer "
    "_codecs.encode builtins.bytearray builtins.complex builtins.set __builtin__.set builtins.frozenset "
    "collections.defaultdict collections.Counter pathlib.PosixPath pathlib.WindowsPath pathlib.PurePosixPath "
    "datetime.datetime datetime.timedelta".split()
)
