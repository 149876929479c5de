"""flax's msgpack format: maps of names down to arrays, each an extension of msgpack that holds shape, dtype and bytes.

Read here and not by msgpack's package, so that arrays stay on the pages of the file; what the format's alignment does
not allow to stay is copied once. Sources: msgpack's spec.md; google/flax, flax/serialization.py.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import torch
from torch import Tensor

from zoo.errors import UnreadableWeights
from zoo.weights.mapped import MappedFile, tensor_over

ARRAYS = (1, 3)  # flax's extension types of an array and of a numpy scalar; 2, a complex number, is no tensor
CHUNKED = "__msgpack_chunked_array__"  # marks a map that holds an array of over a gigabyte in pieces
DTYPES = frozenset(
    "float16 bfloat16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool complex64".split()
)
MAX_DEPTH = 100  # of maps within maps

_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = dict(zip(range(0xCA, 0xD4), (">f", ">d", ">B", ">H", ">I", ">Q", ">b", ">h", ">i", ">q"), strict=True))
_SIZED = {  # first byte -> kind, and how its length is written
    **{0xC4: ("bin", ">B"), 0xC5: ("bin", ">H"), 0xC6: ("bin", ">I")},
    **{0xC7: ("ext", ">B"), 0xC8: ("ext", ">H"), 0xC9: ("ext", ">I")},
    **{0xD9: ("str", ">B"), 0xDA: ("str", ">H"), 0xDB: ("str", ">I")},
    **{0xDC: ("list", ">H"), 0xDD: ("list", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I")},
}
_SHORT = ((0x90, 0x80, "map"), (0xA0, 0x90, "list"), (0xC0, 0xA0, "str"))  # end, start: the length is in the first byte


def is_msgpack(start: bytes) -> bool:
    """Whether a file that starts with these bytes is a msgpack map that is not empty and whose first key is text."""
    after = {0xDE: 3, 0xDF: 5}.get(start[0], 1 if 0x81 <= start[0] <= 0x8F else 0) if start else 0
    return 0 < after < len(start) and (0xA0 <= start[after] <= 0xBF or 0xD9 <= start[after] <= 0xDB)


def read_msgpack(file: MappedFile) -> dict[str, Tensor]:
    """The arrays by name, {"a": {"b": array}} -> "a/b"; what is no array is left out.

    Raises UnreadableWeights where the file is damaged.
    """
    stream = _Stream(file)
    tree = stream.value()
    if stream.at != len(file):
        raise UnreadableWeights(f"{len(file) - stream.at} bytes too many; fetch it again")
    state: dict[str, Tensor] = {}
    _flatten(tree, (), state)
    return state


class _Stream:
    """The values of a msgpack file one after the other. Bytes are given by where they lie, as a range."""

    def __init__(self, file: MappedFile):
        self.file = file
        self.at = 0

    def take(self, count: int) -> bytes:
        where = self.skip(count)
        return self.file.bytes[where.start : where.stop]

    def skip(self, count: int) -> range:
        if self.at + count > len(self.file):
            raise UnreadableWeights("truncated or damaged; fetch it again")
        self.at += count
        return range(self.at - count, self.at)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def head(self) -> tuple[str, Any]:
        """What comes next: its kind and its length, or "value" and the value itself."""
        first = self.take(1)[0]
        if first < 0x80 or first >= 0xE0:
            return "value", first if first < 0x80 else first - 256
        for end, start, kind in _SHORT:
            if start <= first < end:
                return kind, first - start
        if first in _CONSTANTS:
            return "value", _CONSTANTS[first]
        if first in _NUMBERS:
            return "value", self.number(_NUMBERS[first])
        if first in _SIZED:
            kind, form = _SIZED[first]
            return kind, self.number(form)
        if first == 0xC1:
            raise UnreadableWeights("damaged: it holds a byte that msgpack never uses; fetch it again")
        return "ext", 1 << (first - 0xD4)

    def value(self, depth: int = 0) -> Any:
        """The next value: a dict, a list, text, a number, None, a range for bytes, or a tensor."""
        if depth > MAX_DEPTH:
            raise UnreadableWeights(f"damaged: its values lie deeper than {MAX_DEPTH} levels")
        kind, length = self.head()
        if kind == "map":
            return self.map(length, depth)
        if kind == "list":
            return [self.value(depth + 1) for _ in range(length)]
        if kind == "str":
            return self.text(length)
        if kind == "bin":
            return self.skip(length)
        return self.extension(length, depth) if kind == "ext" else length

    def map(self, length: int, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(length):
            name = self.value(MAX_DEPTH)
            if not isinstance(name, str) or name in found:
                raise UnreadableWeights(f"damaged: {str(name)[:80]!r} is no name, or stands twice in one map")
            found[name] = self.value(depth + 1)
        return found

    def text(self, length: int) -> str:
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as error:
            raise UnreadableWeights(f"damaged: it holds text that is not UTF-8 ({error})") from error

    def extension(self, length: int, depth: int) -> Tensor | None:
        code = self.number(">b")
        end = self.at + length
        if code not in ARRAYS:
            self.skip(length)
            return None
        array = self.value(depth + 1)
        if self.at != end or not isinstance(array, list) or len(array) != 3:
            raise UnreadableWeights("damaged: an array that is no shape, dtype and bytes; fetch it again")
        return self.tensor(*array)

    def tensor(self, size: Any, name: Any, data: Any) -> Tensor:
        if not isinstance(name, str) or name not in DTYPES:
            raise UnreadableWeights(f"an array of the dtype {name!r}, which torch lacks or zoo does not read")
        dtype = getattr(torch, name)
        sane = isinstance(size, list) and all(type(n) is int and 0 <= n < 2**48 for n in size)
        if not sane or not isinstance(data, range) or len(data) != math.prod(size) * dtype.itemsize:
            raise UnreadableWeights(f"damaged: a {name} array of size {size} in other bytes than it needs")
        storage = self.file.storage(data.start, len(data), dtype.itemsize)
        return tensor_over(storage, dtype, 0, tuple(size), tuple(math.prod(size[i + 1 :]) for i in range(len(size))))


def _flatten(tree: Any, path: tuple[str, ...], state: dict[str, Tensor]) -> None:
    if isinstance(tree, dict) and CHUNKED in tree:
        tree = _joined(tree)
    if isinstance(tree, dict):
        for name, branch in tree.items():
            _flatten(branch, (*path, name), state)
    elif isinstance(tree, Tensor):
        if "/".join(path) in state:
            raise UnreadableWeights(f"damaged: two arrays are called {'/'.join(path)!r}")
        state["/".join(path)] = tree


def _joined(pieces: dict[str, Any]) -> Tensor:
    """An array of over a gigabyte, put together from {"shape": {"0": n, ...}, "chunks": {"0": array, ...}}."""
    try:
        size = [pieces["shape"][str(i)] for i in range(len(pieces["shape"]))]
        return torch.cat([pieces["chunks"][str(i)] for i in range(len(pieces["chunks"]))]).reshape(size)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UnreadableWeights(f"damaged: the pieces of an array do not fit together ({error})") from error
