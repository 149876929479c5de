"""The row that says where a file is and what its checksum must be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class File:
    """One published file and where it can be had."""

    name: str  # on this machine, below the model's folder
    url: str | None = None
    mirrors: tuple[str, ...] = ()  # tried after url, in order
    repo: str | None = None  # hub id, tried last
    path: str | None = None  # inside repo or archive; None: as `name`
    revision: str | None = None
    archive: File | None = None  # a tar, plain or compressed, or a zip that holds it; then there is no other source
    packaged: str | None = None  # below zoo/assets/
    sha256: str | None = None
    size: int | None = None  # bytes, perhaps only about
