"""Vocabularies are read here: text, plain or gzipped, that says so when it is something else."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.errors import DataError

Merge = tuple[str, str]


def read_text(path: Path, what: str) -> str:
    """The text of a file, plain or gzipped. Raises DataError, which calls the file `what`."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as {what}: {error}") from error


def read_json(path: Path, what: str) -> Any:
    """The value in a json file, plain or gzipped. Raises DataError, which calls the file `what`."""
    try:
        return json.loads(read_text(path, what))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} cannot be read as {what}: {error}") from error


def read_vocabulary(vocabulary: Path, merges: Path, needs: Sequence[str]) -> tuple[dict[str, int], list[Merge]]:
    """A vocab.json, piece -> id, and the merges.txt beside it, two pieces a line below a line of "#version".

    needs: the special pieces, without which it is another model's. Raises DataError.
    """
    pieces = read_json(vocabulary, "a vocab.json")
    if not isinstance(pieces, dict) or not all(type(id) is int and id >= 0 for id in pieces.values()):
        raise DataError(f"{vocabulary} is not a vocab.json: it should name an id for each piece")
    if len(set(pieces.values())) < len(pieces):
        raise DataError(f"{vocabulary} is damaged: two of its pieces have one id")
    if missing := [piece for piece in needs if piece not in pieces]:
        raise DataError(f"{vocabulary} is the vocabulary of another model: it has no {' and no '.join(missing)}")
    lines = read_text(merges, "a merges.txt").removesuffix("\n").split("\n")
    pairs = []
    for number, line in enumerate(lines, start=1):
        if line.startswith("#version"):
            continue
        left, _, right = line.removesuffix("\r").partition(" ")
        if not {left, right, left + right} <= pieces.keys():
            raise DataError(f"{merges} does not belong to {vocabulary}: its line {number} joins {left!r} and {right!r}")
        pairs.append((left, right))
    return pieces, pairs
