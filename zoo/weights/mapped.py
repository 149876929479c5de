"""A file in memory without being read: tensors over its pages, private to this process."""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref
from pathlib import Path

import torch
from torch import Tensor

from zoo.errors import UnreadableWeights

MAX_EXPANDED = 1 << 24  # elements of a tensor that repeats its storage, such as a saved `expand`


class MappedFile:
    """The bytes of a file, read from disk when they are touched. Writing to a tensor over them spares the file."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self.bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.path = path

    def __len__(self) -> int:
        return len(self.bytes)

    def storage(self, start: int, count: int, alignment: int = 1) -> torch.UntypedStorage:
        """`count` bytes from `start`, without a copy where the start is a multiple of `alignment`.

        When the last tensor over them dies, their pages leave memory, though the rest of the file stays mapped.
        Raises UnreadableWeights where they reach beyond the end of the file.
        """
        if start < 0 or count < 0 or start + count > len(self):
            raise UnreadableWeights(f"truncated: it ends {start + count - len(self)} bytes too early; fetch it again")
        if count == 0:
            return torch.UntypedStorage(0)
        buffer = (ctypes.c_char * count).from_buffer(self.bytes, start)
        weakref.finalize(buffer, _release, self.bytes, start, count).atexit = False
        held = torch.frombuffer(buffer, dtype=torch.uint8)
        return (held if start % alignment == 0 else held.clone()).untyped_storage()


def _release(pages: mmap.mmap, start: int, count: int) -> None:
    """Gives back the pages that lie wholly within: those at the ends may be a neighbour's too."""
    first = math.ceil(start / mmap.PAGESIZE) * mmap.PAGESIZE
    last = (start + count) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED, first, last - first)


def tensor_over(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    """A tensor over a storage, offset and strides in elements. Raises UnreadableWeights where it does not fit in."""
    if len(size) != len(stride) or math.prod(filter(None, size)) >= 2**62:
        raise UnreadableWeights(f"a tensor of the impossible size {size} and stride {stride}")
    count = math.prod(size)
    if count == 0:
        return torch.empty(size, dtype=dtype)
    held = storage.nbytes() // dtype.itemsize
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if last >= held or count > max(held, MAX_EXPANDED):
        raise UnreadableWeights(f"a tensor of size {size} and stride {stride} over a storage of {held} elements")
    return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)
