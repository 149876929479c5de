"""Checkpoints that any engine writes and any engine reads, on any number of processes.

step-00000120/
    manifest.json                    every file with its bytes and CRC-32, and its own CRC-32, written last
    rank-00000.safetensors           tensors and pieces of tensors, "weights/NAME", "exp_avg/NAME", ...
    rank-00000.{json,safetensors}    what is this rank's own: its random numbers, what its optimizer counts
    state.{json,safetensors}         what is the run's: its step, its schedule, the client's own state

A piece knows where it belongs: the shape of the whole tensor and where in it the piece starts. So nothing has to be
gathered to save under ZeRO, and whoever loads takes what it needs of whichever files hold it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo import distributed, weights
from zoo.distributed import Channel
from zoo.errors import CheckpointError, DiskFull, UnreadableWeights, WeightsMismatch, ZooError

from . import state_file
from .engines.base import EMA, WEIGHTS, Piece

_MANIFEST, _CHUNK = "manifest.json", 1 << 24
FORMAT = 2  # 1 was one process's model.safetensors and optimizer.safetensors

Pieces = dict[str, dict[str, Piece]]


@dataclass(frozen=True)
class Snapshot:
    """What a rank adds to a checkpoint: its pieces, what else it owns, and what is the run's, which rank 0 writes."""

    pieces: Pieces
    own: dict[str, Any]
    shared: dict[str, Any]


# --- writing ---------------------------------------------------------------------------------------------------------
def write(folder: Path, snapshot: Snapshot, channel: Channel) -> None:
    """Writes a checkpoint, whole or not at all; all ranks call it. Raises DiskFull, on every rank if on one."""
    rank = distributed.rank()
    with weights.atomic_folder(folder) if rank == 0 else nullcontext() as aside:
        aside = Path(channel.exchange(str(aside))[0])
        outcomes = channel.exchange(_attempt(aside, rank, snapshot))
        for other, outcome in enumerate(outcomes):
            if "error" in outcome:
                error = DiskFull if outcome["full"] else CheckpointError
                raise error(f"{folder.name} could not be written by rank {other}: {outcome['error']}")
        if rank == 0:
            files = {name: row for outcome in outcomes for name, row in outcome.items()}
            manifest = {"format": FORMAT, "world_size": len(outcomes), "files": files}
            text = json.dumps(manifest | {"check": _check_of(manifest)}, indent=1)
            (aside / _MANIFEST).write_text(text + "\n", encoding="utf-8")
    channel.exchange()  # nobody goes on before it has its name


def _attempt(aside: Path, rank: int, snapshot: Snapshot) -> dict[str, Any]:
    """Name -> [bytes, CRC-32] of the files that this rank wrote; or {"error", "full"}, for the other ranks to hear."""
    try:
        name = f"rank-{rank:05d}"
        tensors, places = flatten(snapshot.pieces)
        weights.write(tensors, aside / f"{name}.pieces.safetensors")
        state_file.write(snapshot.own | {"places": places}, aside, name)
        if rank == 0:
            state_file.write(snapshot.shared, aside, "state")
        names = (name, "state") if rank == 0 else (name,)
        mine = [path for path in sorted(aside.iterdir()) if path.name.split(".")[0] in names]
        for path in mine:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        return {path.name: [path.stat().st_size, checksum(path)] for path in mine}
    except (OSError, RuntimeError, ZooError) as error:
        if distributed.world_size() == 1:
            raise
        return {"error": str(error), "full": weights.is_full(error, aside)}


def flatten(pieces: Pieces) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """KIND/NAME -> tensor, flat where it is not whole; and of those that are not, where they start in which shape."""
    tensors, places = {}, {}
    for kind, named in pieces.items():
        for name, piece in named.items():
            key = f"{kind}/{name}"
            tensors[key] = piece.values.reshape(piece.shape if piece.is_whole else -1)
            if not piece.is_whole:
                places[key] = [piece.start, list(piece.shape)]
    return tensors, places


def own_share(pieces: Pieces, rank: int, world_size: int) -> Pieces:
    """Of what every rank holds whole, what this one writes: each tensor is written once, and all write as much."""
    loads = [0] * world_size
    share: Pieces = {kind: {} for kind in pieces}
    rows = [(kind, name, piece) for kind, named in pieces.items() for name, piece in named.items()]
    for kind, name, piece in sorted(rows, key=lambda row: (-row[2].values.numel(), row[0], row[1])):
        writer = loads.index(min(loads))
        loads[writer] += piece.values.numel()
        if writer == rank:
            share[kind][name] = piece
    return share


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
    return value


# --- reading ---------------------------------------------------------------------------------------------------------
class Checkpoint:
    """A checkpoint on the disk, checked byte by byte as it is opened; all ranks open it. See `Source`.

    `shared` is the run's state; `own` that of this rank, or None where the run had fewer ranks. Raises CheckpointError,
    on every rank if one finds damage, and where the folder is of an earlier zoo.
    """

    def __init__(self, folder: Path, channel: Channel):
        self.folder = folder
        manifest = self._check(channel)
        self.world_size = manifest["world_size"]
        self.parts: dict[str, dict[str, list[tuple[int, Tensor, tuple[int, ...]]]]] = {}
        owns = [state_file.read(folder, f"rank-{rank:05d}") for rank in range(self.world_size)]
        for rank, own in enumerate(owns):
            self._open(folder / f"rank-{rank:05d}.pieces.safetensors", own["places"])
        self.shared = state_file.read(folder, "state")
        self.own = owns[distributed.rank()] if distributed.rank() < len(owns) else None
        self.engine = dict(owns[0]["engine"])
        for own in owns[1:]:
            self.engine["numbers"] = self.engine["numbers"] | ((own["engine"] or {}).get("numbers") or {})

    def __str__(self) -> str:
        return str(self.folder)

    def _check(self, channel: Channel) -> dict[str, Any]:
        """The manifest. Each rank checks a share of the files, and all of them hear of what is wrong."""
        problem, manifest = None, {}
        try:
            manifest = json.loads((self.folder / _MANIFEST).read_text(encoding="utf-8"))
            if manifest.pop("check", None) != _check_of(manifest):
                raise ValueError("it has changed since it was written")
            if manifest["format"] != FORMAT:
                raise ValueError(f"format {manifest['format']}, and this zoo reads {FORMAT}")
            rows = sorted(manifest["files"].items())
            for name, (size, crc) in rows[distributed.rank() :: distributed.world_size()]:
                problem = problem or _fault(self.folder / name, size, crc)
        except FileNotFoundError:
            problem = f"it has no {_MANIFEST}: it was not written to the end, or by an earlier zoo"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{_MANIFEST} cannot be used: {error}"
        problems = [p for p in channel.exchange(problem) if p]
        if problems:
            raise CheckpointError(f"{self.folder}: {problems[0]}")
        return manifest

    def _open(self, path: Path, places: dict[str, Any]) -> None:
        try:
            tensors = weights.read(path)
        except (OSError, UnreadableWeights) as error:
            raise CheckpointError(f"{self.folder}: {error}") from error
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            start, shape = places.get(key, (0, tuple(tensor.shape)))
            self.parts.setdefault(kind, {}).setdefault(name, []).append((start, tensor.reshape(-1), tuple(shape)))

    @property
    def optimizer_kinds(self) -> set[str]:
        """The kinds of tensors that are the optimizer's."""
        return set(self.parts) - {WEIGHTS, EMA}

    def names(self, kind: str) -> set[str]:
        """The tensors of this kind."""
        return set(self.parts.get(kind, ()))

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.parts[kind][name][0][2]

    @torch.no_grad()
    def fill(self, kind: str, name: str, piece: Piece) -> None:
        """Copies into the piece its part of the tensor. Raises WeightsMismatch, CheckpointError."""
        shape = self.shape(kind, name)
        if shape != tuple(piece.shape):
            raise WeightsMismatch(
                f"{self.folder} is of another model: {name} is {shape} there and {tuple(piece.shape)} here. "
                "Choose a new run_folder"
            )
        wanted, filled = piece.values.reshape(-1), 0
        end = piece.start + wanted.numel()
        for start, values, _ in self.parts[kind][name]:
            first, last = max(start, piece.start), min(start + values.numel(), end)
            if first < last:
                wanted[first - piece.start : last - piece.start].copy_(values[first - start : last - start])
                filled += last - first
        if filled != wanted.numel():
            raise CheckpointError(f"{self.folder} holds {filled} of {wanted.numel()} numbers of {kind}/{name}")
        if wanted.data_ptr() != piece.values.data_ptr() and wanted.numel():
            piece.values.copy_(wanted.reshape(piece.values.shape))

    def tensor(self, kind: str, name: str) -> Tensor:
        """The whole tensor, on the CPU; the mapped file itself where one file holds all of it."""
        parts, shape = self.parts[kind][name], self.shape(kind, name)
        if len(parts) == 1 and parts[0][1].numel() == math.prod(shape):
            return parts[0][1].reshape(shape)
        whole = torch.empty(shape, dtype=parts[0][1].dtype)
        self.fill(kind, name, Piece(whole, shape))
        return whole


def _check_of(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())


def _fault(path: Path, size: int, crc: int) -> str | None:
    if not path.exists():
        return f"{path.name} is missing"
    found = path.stat().st_size
    if found != size:
        return f"{path.name} has {found} bytes and should have {size}"
    return None if checksum(path) == crc else f"{path.name} has changed since it was written: a bit flipped, or an edit"


# --- whole weights ---------------------------------------------------------------------------------------------------
class _Whole(Mapping):
    """Name -> whole tensor in fp32, put together when it is asked for: never more than one in memory."""

    def __init__(self, tensor: Callable[[str], Tensor], names: dict[str, str]):
        self.tensor, self.names = tensor, names

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensor(self.names[name])
        return tensor.float() if tensor.is_floating_point() else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def export(pieces: dict[str, Piece], names: dict[str, str], path: Path, channel: Channel, *, whole: bool) -> None:
    """Writes the whole weights in fp32 as one safetensors file; all ranks call it. Raises DiskFull, CheckpointError.

    `names`: every name that the file gets -> the name among the `pieces`. These are `whole` on every rank, or parts,
    which meet in a folder beside the file.
    """
    error, aside = None, path.with_name(f".{path.name}.pieces")
    if whole:
        find = lambda name: pieces[name].values.reshape(pieces[name].shape)  # noqa: E731
    else:
        write(aside, Snapshot({WEIGHTS: pieces}, {"engine": {"numbers": {}}}, {}), channel)
        find = partial(Checkpoint(aside, channel).tensor, WEIGHTS)
        channel.exchange()  # all have opened what rank 0 will remove
    if distributed.rank() == 0:
        try:
            weights.write(_Whole(find, names), path)
        except DiskFull as failure:
            error = failure
        shutil.rmtree(aside, ignore_errors=True)
    said = channel.exchange(error and str(error))[0]
    if said:
        raise DiskFull(said) from error
