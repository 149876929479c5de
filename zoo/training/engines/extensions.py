"""The kernels that DeepSpeed compiles on first use, and the lock that a build leaves behind when it is killed."""

from __future__ import annotations

import logging
import os
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger("zoo.training")

STALE = 120.0  # seconds without any change in a build's folder, and nobody building there, after which it is dead


def wait_for_builds(names: tuple[str, ...]) -> None:
    """Waits for builds of these kernels that are under way elsewhere, and removes the locks of those that were killed.

    torch waits for such a lock without end (torch/utils/file_baton.py).
    """
    for lock in (lock for name in names for lock in _locks(name)):
        said = False
        while lock.exists() and (_builder(lock.parent) or _age(lock.parent) < STALE):
            if not said:
                logger.warning("waiting for another process that builds %s; if none does, delete %s", lock.parent, lock)
                said = True
            time.sleep(0.5)
        if lock.exists():
            logger.warning("the build of %s was killed before its end: it is begun again", lock.parent)
            lock.unlink(missing_ok=True)


def _locks(name: str) -> Iterator[Path]:
    from torch.utils.cpp_extension import get_default_build_root

    if own := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(own).glob(f"{name}/lock")
    version = sysconfig.get_python_version().replace(".", "")
    return Path(get_default_build_root()).glob(f"py{version}*/{name}/lock")


def _builder(folder: Path) -> bool:
    """Whether a process of this machine works in the folder."""
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if Path(os.readlink(link)) == folder.resolve():
                return True
        except OSError:  # it ended, or is another user's
            continue
    return False


def _age(folder: Path) -> float:
    """Seconds since anything changed in the folder."""
    try:
        return time.time() - max(path.stat().st_mtime for path in [folder, *folder.iterdir()])
    except FileNotFoundError:
        return STALE
