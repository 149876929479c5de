"""FFRecord: many samples in one file, each found by its number and guarded by its own CRC-32. Pure Python.

The format (HFAiLab/ffrecord 1.4, little-endian, no magic, no padding):

    offset 0         u32     CRC-32 of bytes 4 .. 12+12N; 0 in files of the oldest version, which have none
    offset 4         i64     N, the number of samples
    offset 12        u32[N]  CRC-32 of each sample
    offset 12+4N     i64[N]  where each sample begins in the file
    offset 12+12N    the samples, back to back; the last one ends where the file ends

Files are read through a memory map: a sample is a view of the page cache, not a copy. A file must therefore not be cut
short in place while it is open; `RecordWriter` never does, since it replaces files whole.
"""

from __future__ import annotations

import errno
import mmap
import operator
import os
import struct
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from zoo.errors import BadRecords, DiskFull, EmptyDataset, SettingsError, UnfinishedRecords

_FIXED = 12  # bytes of header before the tables: the checksum and N
_PER_SAMPLE = 12  # bytes of header per sample: u32 checksum and i64 offset
_CHECKS = ("always", "first", "never")
PathLike = str | os.PathLike[str]


# --- writing ---------------------------------------------------------------------------------------------------------
class RecordWriter:
    """Writes exactly `n` samples to `path`, all or nothing.

        with RecordWriter("train.ffr", n=2) as writer:
            writer.write_one(b"first")
            writer.write_one(b"second")

    The bytes go to `<name>.<pid>.part` beside `path`, reach the disk, and only then take the final name. After an
    exception, or with another number of samples than promised (BadRecords), or without room (DiskFull), nothing new
    stands under that name; a killed process leaves the `.part` file at most.
    """

    def __init__(self, path: PathLike, n: int) -> None:
        self.path, self.n = Path(path), operator.index(n)
        if self.n < 0:
            raise SettingsError(f"a record file of {self.n} samples: n counts the samples to come, from 0 up")
        self._crcs, self._offsets = array("I"), array("q")
        self._end = _FIXED + _PER_SAMPLE * self.n
        self._aside = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        self._file = open(self._aside, "wb", buffering=1 << 20)
        self._file.seek(self._end)

    def write_one(self, buf: bytes | bytearray | memoryview) -> None:
        """Append one sample: all bytes of any buffer, whatever its item size and shape."""
        if self._file.closed:
            raise BadRecords(f"{self.path}: this writer is closed")
        if len(self._crcs) == self.n:
            raise BadRecords(f"{self.path}: a sample beyond the {self.n} that were promised; pass the right n")
        view = memoryview(buf)
        contiguous = view.c_contiguous and view.nbytes
        sample = np.frombuffer(buf, np.uint8) if contiguous else view.tobytes()  # its bytes, whatever its items are
        try:
            self._file.write(sample)
        except OSError as error:
            self._give_up(error)
        self._crcs.append(zlib.crc32(sample))
        self._offsets.append(self._end)
        self._end += len(sample)

    def close(self) -> None:
        """Write the header and publish the file; does nothing when already closed."""
        if self._file.closed:
            return
        if len(self._crcs) != self.n:
            self.abort()
            raise BadRecords(
                f"{self.path}: {self.n} samples were promised and {len(self._crcs)} written; nothing was kept"
            )
        guarded = struct.pack("<q", self.n)
        guarded += np.asarray(self._crcs, "<u4").tobytes() + np.asarray(self._offsets, "<i8").tobytes()
        try:
            self._file.seek(0)
            self._file.write(struct.pack("<I", zlib.crc32(guarded)) + guarded)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._aside, self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            self._give_up(error)

    def abort(self) -> None:
        """Forget what was written; nothing appears under the final name."""
        with suppress(OSError):  # the buffered rest may not fit on the disk: it was to be dropped anyway
            self._file.close()
        self._aside.unlink(missing_ok=True)

    def _give_up(self, error: OSError) -> None:
        self.abort()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"no room for {self.path} ({self._end / 1e6:.1f} MB and more); what was half-written has been removed: "
                "free some space and write again"
            ) from error
        raise error

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close() if kind is None else self.abort()


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


# --- reading ---------------------------------------------------------------------------------------------------------
class _RecordFile:
    """One file: its map, and its two tables as lazy views of that map. Refuses what is no sound record file."""

    def __init__(self, path: str, check_header: bool) -> None:
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self.bytes = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b"")
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
            raise BadRecords(f"{path}: cannot be opened ({error.strerror})") from error
        if self.size < _FIXED:
            raise BadRecords(f"{path}: {self.size} bytes are no record file: the shortest has {_FIXED}; fetch it again")
        self.meta_crc, self.count = struct.unpack_from("<Iq", self.bytes)
        self.first = _FIXED + _PER_SAMPLE * self.count  # where the samples begin
        if self.count < 0 or self.first > self.size:
            raise BadRecords(
                f"{path}: its header promises {self.count} samples, which do not fit into {self.size} bytes; it is cut "
                f"short, or no record file (it begins with {bytes(self.bytes[:8])!r}); fetch it again"
            )
        self.crcs = np.frombuffer(self.bytes, "<u4", self.count, _FIXED)
        self.offsets = np.frombuffer(self.bytes, "<i8", self.count, _FIXED + 4 * self.count)
        if check_header:
            self.check_header()
        self._check_offsets()

    def _check_offsets(self) -> None:
        """The samples must lie one behind the other between the header and the end of the file."""
        if self.count:
            sound = self.offsets[0] == self.first and not (self.offsets[1:] < self.offsets[:-1]).any()
        else:
            sound = self.size == _FIXED
        if not sound and self.meta_crc == 0:  # a writer's last deed is this checksum; before, zeros stand there
            raise UnfinishedRecords(f"{self.path}: its writer never finished, so the header is missing; write it again")
        if not sound:
            raise BadRecords(f"{self.path}: the header does not describe the bytes that follow; fetch it again")
        if self.count and self.offsets[-1] > self.size:
            raise BadRecords(
                f"{self.path}: cut short: sample {self.count - 1} should begin at byte {self.offsets[-1]}, and the "
                f"file has {self.size}; fetch it again"
            )

    def check_header(self) -> None:
        # N and both tables stand one behind the other, just as the checksum covers them
        if self.meta_crc and zlib.crc32(self.bytes[4 : self.first]) != self.meta_crc:
            raise BadRecords(f"{self.path}: the header does not have its checksum: it is damaged; fetch it again")

    def span(self, i: int) -> tuple[int, int]:
        return int(self.offsets[i]), int(self.offsets[i + 1]) if i + 1 < self.count else self.size

    def is_sound(self, i: int) -> bool:
        start, end = self.span(i)
        return zlib.crc32(self.bytes[start:end]) == self.crcs[i]


class RecordReader:
    """Random access to the samples of one or many record files, numbered through in order.

    `source`: a file, a list of files, or a folder (its `*.ffr`, sorted by name). `check` says when a sample's checksum
    is verified: on "always" every read, on the "first" read of each sample by this reader, or "never" (which also lets
    a file with a damaged header checksum or last sample be opened, to save the rest). Samples are read-only memoryviews
    without a copy. A reader can be pickled (it opens the files again) and used after a fork.

    Raises BadRecords or UnfinishedRecords, naming file and sample, EmptyDataset for a folder without record files.
    """

    def __init__(self, source: PathLike | Iterable[PathLike], check: str = "always") -> None:
        if check not in _CHECKS:
            raise SettingsError(f"check={check!r}: choose one of {', '.join(_CHECKS)}")
        self.check = check
        self.paths = _paths_of(source)
        self._files = [_RecordFile(path, check_header=check != "never") for path in self.paths]
        self._starts = [0]  # global number of each file's first sample, and the total
        for file in self._files:
            self._starts.append(self._starts[-1] + file.count)
        self._seen = bytearray(len(self)) if check == "first" else None
        if check != "never":
            self._check_ends()

    def _check_ends(self) -> None:
        """A missing or added end shows only in the last sample: no length is stored for it."""
        for file in self._files:
            if file.count and not file.is_sound(file.count - 1):
                raise BadRecords(
                    f"{file.path}: sample {file.count - 1}, the last, is damaged, cut short or followed by foreign "
                    "bytes; fetch the file again, or open it with check='never' to save the other samples"
                )

    def __len__(self) -> int:
        return self._starts[-1]

    def _find(self, i: int) -> tuple[int, _RecordFile, int]:
        """Number, possibly negative -> (number from the beginning, file, number within the file)."""
        at = operator.index(i) + (len(self) if i < 0 else 0)
        if not 0 <= at < len(self):
            raise IndexError(f"sample {i} of {len(self)} in {', '.join(self.paths[:3])}")
        which = bisect_right(self._starts, at) - 1
        return at, self._files[which], at - self._starts[which]

    def name(self, i: int) -> str:
        """What to call sample `i` in a message: its file, and its number in there."""
        _, file, local = self._find(i)
        return f"{file.path}, sample {local}"

    def read_one(self, i: int) -> memoryview:
        """The bytes of sample `i`; negative numbers count from the end, as in a list. Raises IndexError, BadRecords."""
        at, file, local = self._find(i)
        start, end = file.span(local)
        sample = file.bytes[start:end]
        if self.check == "never" or (self._seen and self._seen[at]):
            return sample
        if zlib.crc32(sample) != file.crcs[local]:
            raise BadRecords(
                f"{self.name(at)}: damaged, its checksum is another; fetch the file again, or leave it out"
            )
        if self._seen:
            self._seen[at] = 1
        return sample

    def read(self, indices: Iterable[int]) -> list[memoryview]:
        """The samples in the order asked for, as often as asked for."""
        return [self.read_one(i) for i in indices]

    def validate(self) -> None:
        """Check every header and every sample. Raises BadRecords listing the damaged samples of each file."""
        damage = []
        for file in self._files:
            file.check_header()
            bad = [i for i in range(file.count) if not file.is_sound(i)]
            if bad:
                more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
                damage.append(f"{file.path}: damaged samples {', '.join(map(str, bad[:10]))}{more} of {file.count}")
        if damage:
            raise BadRecords("; ".join(damage))

    def get_offsets(self, file: int = 0) -> np.ndarray:
        """int64 (N+1,): where each sample of the `file`-th file begins, and that file's size in bytes."""
        return np.append(self._files[file].offsets, np.int64(self._files[file].size))

    def get_checksums(self, file: int = 0) -> np.ndarray:
        """uint32 (N,): the CRC-32 of each sample of the `file`-th file, as its header says."""
        return self._files[file].crcs.copy()

    def close(self) -> None:
        """Let go of the files. Samples already handed out stay valid: they keep their map alive."""
        self._files, self._starts = [], [0]

    def __enter__(self) -> RecordReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple:
        return RecordReader, (self.paths, self.check)


def _paths_of(source: PathLike | Iterable[PathLike]) -> list[str]:
    """Absolute, so that a reader pickled into a process of another working folder finds its files."""
    if not isinstance(source, str | os.PathLike):
        paths = list(source)
    elif os.path.isdir(source):
        paths = sorted(Path(source).glob("*.ffr"))
    else:
        paths = [source]
    if not paths:
        raise EmptyDataset(f"{source}: no .ffr file to read")
    return [os.path.abspath(path) for path in paths]
