"""Checkpoints written beside the training: copied, then written by a thread, so that the loop hardly waits."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from torch import Tensor

from zoo.devices import free_memory
from zoo.distributed import Channel

from .checkpoint import Pieces, Snapshot, write
from .engines.base import Piece

_SHARE = 4  # what is copied may take this part of the free memory of the machine, and no more
_NICE = 10  # training goes first: where all cores compute, an equal thread makes them all wait for one another


class Saver:
    """Writes one checkpoint after the other. `asynchronous`: None lets it follow from the free memory.

    All ranks call every method in the same order. An error of the thread is raised by the next `wait` or `save`.
    """

    def __init__(self, asynchronous: bool | None, after: Callable[[], None]):
        self.asynchronous, self.after = asynchronous, after
        self.channel = Channel()
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.staging: dict[tuple[str, str], Tensor] = {}
        self.prepared = False

    def prepare(self, pieces: Callable[[], Pieces]) -> None:
        """Takes the memory of the copies beside the training, the first time: new memory is slow to touch."""
        if self.prepared or self.asynchronous is False:
            return
        self.prepared = True
        found = pieces()
        if self._may_copy(found):
            self._start(lambda: self._take_memory(found))

    def save(self, folder: Path, snapshot: Snapshot) -> None:
        """Starts writing, after what is still being written is there; `after` is called when it has its name.

        Raises DiskFull, CheckpointError.
        """
        self.wait()
        if not self._may_copy(snapshot.pieces):
            self._write(folder, snapshot)
            return
        copied = Snapshot(self._copied(snapshot.pieces), deepcopy(snapshot.own), deepcopy(snapshot.shared))
        self._start(lambda: self._write(folder, copied))

    def wait(self) -> None:
        """Until the last checkpoint is on the disk. Raises DiskFull, CheckpointError if it could not be written."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """What was begun is ended, also where the run fails; its own error is raised only where there is no other."""
        if kind is None:
            self.wait()
        elif self.thread is not None:
            self.thread.join()

    def _write(self, folder: Path, snapshot: Snapshot) -> None:
        write(folder, snapshot, self.channel)
        self.after()

    def _start(self, work: Callable[[], None]) -> None:
        self.thread = threading.Thread(target=self._try, args=(work,), name="zoo-saver", daemon=True)
        self.thread.start()

    def _try(self, work: Callable[[], None]) -> None:
        if sys.platform == "linux":  # there threads have priorities of their own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        try:
            work()
        except Exception as error:  # whatever it is, the loop raises it
            self.error = error

    def _may_copy(self, pieces: Pieces) -> bool:
        """The same answer on every rank: they write together."""
        if self.asynchronous is None:
            size = sum(p.values.numel() * p.values.element_size() for named in pieces.values() for p in named.values())
            new = size - sum(t.numel() * t.element_size() for t in self.staging.values())
            return not any(self.channel.maximum(float(new * _SHARE > free_memory())))
        return self.asynchronous

    @torch.no_grad()
    def _take_memory(self, pieces: Pieces) -> None:
        for kind, named in pieces.items():
            for name, piece in named.items():
                self._held(kind, name, piece.values).zero_()

    def _held(self, kind: str, name: str, values: Tensor) -> Tensor:
        """Memory of our own for these values, which is kept from save to save."""
        held = self.staging.get((kind, name))
        if held is None or held.shape != values.shape or held.dtype != values.dtype:
            held = torch.empty_like(values, device="cpu", memory_format=torch.contiguous_format)
            self.staging[kind, name] = held
        return held

    @torch.no_grad()
    def _copied(self, pieces: Pieces) -> Pieces:
        """The pieces in memory of our own."""
        copies: Pieces = {}
        for kind, named in pieces.items():
            for name, piece in named.items():
                held = self._held(kind, name, piece.values).copy_(piece.values)
                copies.setdefault(kind, {})[name] = Piece(held, piece.shape, piece.start)
        return copies
