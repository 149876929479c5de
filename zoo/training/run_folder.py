"""All that one run writes: settings.json, log.jsonl, checkpoints/, best/, and at the end the weights with their config.

settings.json  log.jsonl  tensorboard/
checkpoints/step-00000120/   see `checkpoint`
best/                        model.safetensors  config.json  metrics.json, and the files kept beside
model.safetensors  config.json, and the files kept beside, such as the tokenizer's
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import nn

from zoo import weights
from zoo.distributed import Channel
from zoo.errors import CheckpointError, SettingsError

from .log import logger
from .settings import differs

_CHECKPOINT = re.compile(r"step-(\d{8,})")


def model_config(model: nn.Module) -> str | None:
    """The text of config.json: `model.config`, a dataclass or a dict; None if there is none. Raises SettingsError."""
    config = getattr(model, "config", None)
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    if not isinstance(config, dict):
        return None
    try:
        return json.dumps(config, indent=2) + "\n"
    except TypeError as error:
        raise SettingsError(
            f"model.config cannot be written as JSON: {error}; keep numbers, text and lists in it"
        ) from error


class RunFolder:
    """The paths of a run, and who may stay in them. Only rank 0 writes.

    `beside`: name -> file, of what the weights are useless without, as the tokenizer's files. They are copied when the
    run starts, since they may not be where they were when it ends.
    """

    def __init__(self, path: str | Path, writes: bool = True, beside: Mapping[str, str | Path] | None = None):
        self.path, self.writes, self.beside = Path(path), writes, dict(beside or {})
        self.checkpoints, self.log = self.path / "checkpoints", self.path / "log.jsonl"
        self.model, self.best = self.path / "model.safetensors", self.path / "best"

    @contextmanager
    def alone(self, channel: Channel) -> Iterator[None]:
        """Makes the folder and keeps other runs out of it. Raises SettingsError, on every rank, if one is in it."""
        lock, error = FileLock(self.path / ".lock", blocking=False), None
        if self.writes:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout:
                error = f"another process trains in {self.path}: stop it, or choose a new run_folder"
        said = channel.exchange(error)[0]
        if said:
            raise SettingsError(said)
        try:
            yield
        finally:
            lock.release()

    def agree(self, record: dict[str, Any], free: frozenset[str], channel: Channel) -> None:
        """Writes `record` as settings.json, and the files kept beside; settings that are there and say otherwise,
        except in `free`, are an error.

        Raises SettingsError, on every rank, also where the ranks do not see the same folder.
        """
        file, error = self.path / "settings.json", None
        if self.writes:
            try:
                self._compare(file, record, free)
                self.write_text(file, json.dumps(record, indent=2) + "\n")
                self._keep_beside()
            except (SettingsError, CheckpointError) as failure:
                error = failure
        said = channel.exchange(error and str(error))[0]
        if said:
            raise error or SettingsError(said)
        blind = [rank for rank, sees in enumerate(channel.exchange(file.exists())) if not sees]
        if blind:
            raise SettingsError(
                f"rank {blind[0]} does not see {file}, which rank 0 wrote: put run_folder where all machines see it"
            )

    def _compare(self, file: Path, record: dict[str, Any], free: frozenset[str]) -> None:
        if not file.exists():
            return
        before = self._read(file)
        for name in [*record, *before]:
            if name not in free and before.get(name) != record.get(name):
                raise differs(name, before.get(name), record.get(name))
        together = before.get("samples_together"), record.get("samples_together")
        if together[0] != together[1]:
            logger.warning(
                "a micro-batch of all processes is %s samples where it was %s: a loss that compares the samples of a "
                "micro-batch, as CLIP's does, is another loss now",
                *together[::-1],
            )

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{file} is damaged ({error}): choose a new run_folder") from error

    def _keep_beside(self) -> None:
        for name, source in self.beside.items():
            try:
                weights.copy_file(Path(source), self.path / name)
            except FileNotFoundError as error:
                raise SettingsError(f"{source}, which is to lie beside the weights as {name}, is not there") from error

    def describe(self, folder: Path, config: str | None) -> None:
        """Writes into `folder` what its weights are loaded with: config.json, and the files kept beside. Rank 0 does
        it. Raises DiskFull."""
        if not self.writes:
            return
        folder.mkdir(exist_ok=True)
        if config is not None:
            self.write_text(folder / "config.json", config)
        for name in self.beside if folder != self.path else ():
            weights.copy_file(self.path / name, folder / name)

    def write_text(self, file: Path, text: str) -> None:
        """Writes the file aside and renames it. Raises DiskFull."""
        with weights.atomic_file(file) as aside:
            Path(aside).write_text(text, encoding="utf-8")

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of this step is or will be."""
        return self.checkpoints / f"step-{step:08d}"

    def found(self) -> list[Path]:
        """The checkpoints that are there, newest first. What an interrupted write left aside is none of them."""
        if not self.checkpoints.is_dir():
            return []
        steps = {int(m[1]): path for path in self.checkpoints.iterdir() if (m := _CHECKPOINT.fullmatch(path.name))}
        return [steps[step] for step in sorted(steps, reverse=True)]

    def prune(self, keep: int) -> None:
        """Removes all checkpoints but the newest `keep`. Rank 0 does it."""
        if not self.writes:
            return
        for old in self.found()[keep:]:
            # A removal that is killed half-way must not leave what looks like a checkpoint.
            old.rename(old.with_name(f".{old.name}.removed"))
        for doomed in self.checkpoints.glob(".*.removed"):
            shutil.rmtree(doomed)

    def set_aside(self, damaged: list[Path]) -> None:
        """Renames checkpoints that cannot be read, so that none is taken for one again."""
        for path in damaged if self.writes else []:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
