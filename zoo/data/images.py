"""Encoded pictures -> PIL pictures, and pictures with their metadata <-> records."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from zoo.errors import BadImage, BadRecords

from .records import PathLike

# not all that Pillow knows: among its formats is EPS, for which it starts Ghostscript
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")


def open_image(source: PathLike | bytes | memoryview, mode: str | None = "RGB", name: str = "picture") -> Image.Image:
    """A file, or the bytes of one (called `name` in messages) -> the decoded picture; `mode=None` keeps its own mode.

    Raises BadImage, naming the file, when it is missing, cut short, no picture, or so large that decoding it would
    exhaust the memory (Pillow's limit: twice `PIL.Image.MAX_IMAGE_PIXELS`).
    """
    if isinstance(source, str | os.PathLike):
        name, source = os.fspath(source), read_bytes(source)
    try:
        with Image.open(io.BytesIO(source), formats=_FORMATS) as picture:
            picture.load()
    except Image.DecompressionBombError as error:
        raise BadImage(f"{name}: too large to be decoded safely ({error}); scale it down or leave it out") from error
    except UnidentifiedImageError as error:
        known = ", ".join(dict.fromkeys(_FORMATS))
        raise BadImage(
            f"{name}: not a readable picture, which are {known}; replace the file or leave it out"
        ) from error
    except MemoryError:
        raise  # this machine is at its limit; the picture may be fine
    except Exception as error:  # on damaged bytes Pillow's decoders raise whatever their parsing ran into
        raise BadImage(f"{name}: not a readable picture ({error}); replace the file or leave it out") from error
    return picture.convert(mode) if mode else picture


def read_bytes(path: PathLike) -> bytes:
    """The bytes of a file of a data set. Raises BadImage, naming it, when it is not there or not readable."""
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise  # this machine is at its limit; the picture may be fine
        raise BadImage(f"{path}: cannot be read ({error}); correct the path or leave it out") from error


def pack_sample(row: dict[str, Any], picture: bytes) -> bytes:
    """A record of ours: u32 length of the JSON (little-endian), the row as JSON in UTF-8, the encoded picture."""
    head = json.dumps(row, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode()
    return struct.pack("<I", len(head)) + head + picture


def unpack_sample(record: bytes | memoryview, name: str = "record") -> tuple[dict[str, Any], memoryview]:
    """The inverse of `pack_sample`. Raises BadRecords, with the `name`, when this is no such record."""
    view = memoryview(record)
    end = 4 + struct.unpack_from("<I", view)[0] if len(view) >= 4 else 0
    try:
        row = json.loads(bytes(view[4:end])) if 4 < end <= len(view) else None
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise BadRecords(f"{name}: not a JSON row and a picture; write records with zoo.data.pack_sample")
    return row, view[end:]
