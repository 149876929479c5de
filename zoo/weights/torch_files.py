"""Files of torch.save and torch.jit.save -> tensors: the zip archives, and the stream that torch.save wrote before 1.6.

Source: torch/serialization.py (both layouts), caffe2/serialize/inline_container.cc (names and alignment in the zip).
The code that a TorchScript archive carries is never opened.
"""

from __future__ import annotations

import io
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from zoo.errors import UnreadableWeights
from zoo.weights.mapped import MappedFile, tensor_over
from zoo.weights.numpy_pickle import arrays
from zoo.weights.pickle_records import StorageRef, TensorRef
from zoo.weights.safe_pickle import named_tensors, unpickle

PICKLE_START = b"\x80"
_MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save wrote first, before 1.6
MAX_INFLATION = 20  # weights hardly compress, bombs do
_LOCAL_HEADER = 30  # bytes, then the name and the extra field


def read_zip(file: MappedFile) -> dict[str, Tensor]:
    """The tensors of an archive by dotted name, stored members without a copy.

    Raises UnsafePickle, and UnreadableWeights where the archive is damaged or none of torch's.
    """
    try:
        with zipfile.ZipFile(file.path) as archive:
            return _Archive(file, archive).tensors()
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OSError, NotImplementedError) as error:
        raise UnreadableWeights(f"a damaged or truncated zip archive ({error}); fetch it again") from error


class _Archive:
    """A zip archive whose one folder at the top holds data.pkl and data/<key>."""

    def __init__(self, file: MappedFile, archive: zipfile.ZipFile) -> None:
        self.file = file
        self.archive = archive
        self.inflated = 0
        pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UnreadableWeights("a zip archive, but none that torch wrote: it has no data.pkl")
        self.root = pickles[0].removesuffix("/data.pkl")

    def tensors(self) -> dict[str, Tensor]:
        records = named_tensors(unpickle(io.BytesIO(self.read("data.pkl"))))
        stated = f"{self.root}/byteorder" in self.archive.namelist()  # files from before torch 2.1 do not say
        order = self.read("byteorder").decode("ascii", "replace") if stated else "little"
        return _build(records, self.storage, order)

    def storage(self, ref: StorageRef, alignment: int) -> torch.UntypedStorage:
        name = f"data/{ref.key}"
        info = self.member(name)
        if info.compress_type != zipfile.ZIP_STORED:
            held = bytearray(self.read(name))
            return torch.frombuffer(held, dtype=torch.uint8).untyped_storage() if held else torch.UntypedStorage(0)
        header = self.file.bytes[info.header_offset : info.header_offset + _LOCAL_HEADER]
        if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\3\4"):
            raise UnreadableWeights(f"a damaged zip archive: {name} is not where it should be; fetch it again")
        start = info.header_offset + _LOCAL_HEADER + sum(struct.unpack("<HH", header[26:30]))
        return self.file.storage(start, info.file_size, alignment)

    def member(self, name: str) -> zipfile.ZipInfo:
        try:
            info = self.archive.getinfo(f"{self.root}/{name}")
        except KeyError as error:
            raise UnreadableWeights(f"the archive lacks its member {name}; fetch it again") from error
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UnreadableWeights("an archive that is encrypted, or compressed in a way that torch never uses")
        return info

    def read(self, name: str) -> bytes:
        info = self.member(name)
        self.inflated += info.file_size
        if self.inflated > MAX_INFLATION * len(self.file) + 2**26:
            raise UnreadableWeights(f"an archive that unpacks to {self.inflated} bytes or more: these are no weights")
        return self.archive.read(info)


def read_legacy(file: MappedFile) -> dict[str, Tensor]:
    """The tensors of a file of torch.save before 1.6: pickles, then each storage as its length and its elements; or
    the arrays of a bare pickle.

    Raises UnsafePickle, and UnreadableWeights where the file is damaged.
    """
    stream = file.bytes
    first = unpickle(stream)
    if first != _MAGIC:
        if found := arrays(first):
            return found
        raise UnreadableWeights("a bare pickle, none of torch.save; open it where you trust it and save safetensors")
    _version, _machine = unpickle(stream), unpickle(stream)
    storages: dict[str, StorageRef] = {}
    records = named_tensors(unpickle(stream, storages))
    starts: dict[str, tuple[int, int]] = {}
    keys = unpickle(stream)
    for key in keys if isinstance(keys, list) else [None]:
        ref = storages.get(key) if isinstance(key, str) else None
        length = stream.read(8)
        if ref is None or key in starts or len(length) < 8 or struct.unpack("<q", length)[0] != ref.count:
            raise UnreadableWeights("damaged or truncated; fetch it again")
        starts[key] = (stream.tell(), ref.count * _dtype(ref.dtype or "uint8").itemsize)
        stream.seek(min(sum(starts[key]), len(file)))

    def storage(ref: StorageRef, alignment: int) -> torch.UntypedStorage:
        if ref.key not in starts:
            raise UnreadableWeights(f"the storage {ref.key} is missing; fetch it again")
        return file.storage(*starts[ref.key], alignment)

    return _build(records, storage, "little")


def _build(
    records: dict[str, TensorRef], storage: Callable[[StorageRef, int], torch.UntypedStorage], order: str
) -> dict[str, Tensor]:
    """Tensors over storages, each of which is opened once, so that what was shared stays shared."""
    opened: dict[str, torch.UntypedStorage] = {}
    state = {}
    for name, ref in records.items():
        dtype = _dtype(ref.dtype)
        key = ref.storage.key
        if key not in opened:
            held = storage(ref.storage, dtype.itemsize)
            opened[key] = held if order == sys.byteorder else _swapped(held, dtype)
        state[name] = tensor_over(opened[key], dtype, ref.offset, ref.size, ref.stride)
    return state


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UnreadableWeights(f"a tensor of the unknown dtype {name!r}")
    return dtype


def _swapped(held: torch.UntypedStorage, dtype: torch.dtype) -> torch.UntypedStorage:
    """A copy with the bytes of each number reversed."""
    width = dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
    count = held.nbytes() // width
    numbers = torch.empty(0, dtype=torch.uint8).set_(held, 0, (count, width), (width, 1))
    return numbers.flip(1).untyped_storage()
