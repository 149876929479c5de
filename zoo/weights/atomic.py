"""Files and folders that are there whole or not at all: written aside, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zoo.errors import DiskFull

_MARK = ".partial"
_FORGOTTEN = 24 * 3600.0  # seconds without a write, after which what another machine left behind is removed


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to, which becomes `path` when the block ends, and is removed if it fails.

    Whatever happens, `path` is the old file or the whole new one. What killed runs left beside it is removed.
    Raises DiskFull where there is no room.
    """
    path = Path(path)
    with _aside(path) as partial:
        yield partial
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)


def copy_file(file: Path, to: Path) -> Path:
    """`to`, a copy that is there whole or not at all, also where several processes make it at once. Raises DiskFull."""
    with atomic_file(to) as aside:
        shutil.copyfile(file, aside)
    return to


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """The same for a folder: yields an empty one, and flushes every file in it before it becomes `path`.

    An old folder at `path` is moved aside first and then removed. A run that is killed between these two renames leaves
    it aside; the next call for `path` puts it back.
    """
    path = Path(path)
    old = path.with_name(f".{path.name}.replaced")
    if old.exists() and not path.exists():
        os.replace(old, path)
    with _aside(path) as partial:
        partial.mkdir()
        yield partial
        for inner in sorted(partial.rglob("*")):
            _flush(inner)
        _flush(partial)
        if path.exists():
            _remove(old)
            os.replace(path, old)
        os.replace(partial, path)
        _flush(path.parent)
        _remove(old)


@contextmanager
def _aside(path: Path) -> Iterator[Path]:
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(f".{_escaped(path.name)}.*{_MARK}"):
        if _is_stale(stale, path.name):
            _remove(stale)
    partial = folder / f".{path.name}.{platform.node()}.{os.getpid()}{_MARK}"
    _remove(partial)
    try:
        yield partial
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk by a RuntimeError
        if is_full(error, folder) and not isinstance(error, DiskFull):
            raise DiskFull(f"no room left in {folder} to write {path.name}; free some space and try again") from error
        raise
    finally:
        _remove(partial)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def _is_stale(partial: Path, name: str) -> bool:
    """Whether its writer is gone: a process of this machine that ended, or nobody for a day."""
    machine, _, number = partial.name.removeprefix(f".{name}.").removesuffix(_MARK).rpartition(".")
    try:
        if os.name == "posix" and machine == platform.node() and number.isdigit():
            os.kill(int(number), 0)
        return time.time() - partial.stat().st_mtime > _FORGOTTEN
    except (ProcessLookupError, FileNotFoundError, OverflowError):
        return True
    except PermissionError:  # a process of another user
        return False


def is_full(error: OSError | RuntimeError, folder: Path) -> bool:
    """Whether the error says, or the disk does, that there is no room left."""
    if isinstance(error, OSError):
        return isinstance(error, DiskFull) or error.errno in (errno.ENOSPC, errno.EDQUOT)
    return shutil.disk_usage(folder).free < 2**20


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Forces a file, or the names in a folder, onto the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders, and needs no flush of their names
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
