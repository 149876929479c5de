"""A file out of a zip or tar archive, plain or compressed. Nothing else is written, and no path in it is followed."""

from __future__ import annotations

import errno
import gzip
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from zoo.errors import DownloadError

DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError)
CHUNK = 1 << 20  # bytes read at most at a time
NAMED = 8  # how many names an error lists


def extract(archive: Path, member: str, target: Path) -> None:
    """The bytes of the regular file `member`, a path in the archive, written to `target`.

    Raises DownloadError where the archive is damaged or has no such file, and OSError where there is no room.
    """
    wanted, others = PurePosixPath(member), []  # "./a" and "a" are one path
    try:
        for name, size, source in _members(archive):
            if source and PurePosixPath(name) == wanted:
                if size > shutil.disk_usage(target.parent).free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                with source() as stream, target.open("wb") as out:
                    shutil.copyfileobj(stream, out, CHUNK)
                return
            others.append(name)
    except DAMAGED as error:
        raise DownloadError(
            f"{archive} is no whole tar or zip archive ({error}). Remove it to download it again."
        ) from error
    held = ", ".join(others[:NAMED]) + ", ..." * (len(others) > NAMED) or "nothing"
    raise DownloadError(f"{archive} holds no file {member}, but {held}. Remove it to download it again.")


def _members(archive: Path) -> Iterator[tuple[str, int, Callable[[], IO[bytes]] | None]]:
    """The path and size of all that an archive holds, and what opens it where it is a regular file."""
    with archive.open("rb") as file:  # zipfile.is_zipfile would take a tar that ends in a zip for one
        is_zip = file.read(4) == b"PK\3\4"
    if is_zip:
        with zipfile.ZipFile(archive) as found:
            for info in found.infolist():
                yield info.filename, info.file_size, None if info.is_dir() else partial(found.open, info)
        return
    with tarfile.open(archive) as found:
        for info in found:
            yield info.name, info.size, partial(found.extractfile, info) if info.isreg() else None
