"""A file out of a tar archive, plain or compressed. Nothing else of it is written, and no path in it is followed."""

from __future__ import annotations

import errno
import gzip
import lzma
import os
import shutil
import tarfile
import zlib
from pathlib import Path, PurePosixPath

from zoo.errors import DownloadError

CHUNK = 1 << 20  # bytes read at most at a time
NAMED = 8  # how many names an error lists


def extract(archive: Path, member: str, target: Path) -> None:
    """The bytes of the regular file `member`, a path in the archive, written to `target`.

    Raises DownloadError where the archive is damaged or has no such file, and OSError where there is no room.
    """
    wanted, others = PurePosixPath(member), []  # "./a" and "a" are one path
    try:
        with tarfile.open(archive) as tar:
            for info in tar:
                if info.isreg() and PurePosixPath(info.name) == wanted:
                    if info.size > shutil.disk_usage(target.parent).free:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    with tar.extractfile(info) as source, target.open("wb") as out:
                        shutil.copyfileobj(source, out, CHUNK)
                    return
                others.append(info.name)
    except (tarfile.TarError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
        raise DownloadError(f"{archive} is no whole tar archive ({error}). Remove it to download it again.") from error
    held = ", ".join(others[:NAMED]) + ", ..." * (len(others) > NAMED) or "nothing"
    raise DownloadError(f"{archive} holds no file {member}, but {held}. Remove it to download it again.")
