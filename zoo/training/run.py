"""One run under way: where it is, what it has summed up, and how that is stored and found again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo import distributed
from zoo.errors import CheckpointError, SettingsError

from . import rng
from .batches import DatasetBatches, LoaderBatches
from .engines import Engine
from .log import Clock, Log, Meter, logger
from .run_folder import RunFolder, model_config
from .schedule import Schedule
from .settings import FREE, Settings


@dataclass(kw_only=True)
class Run:
    """What changes while a run goes on. The position is `step`, updates done, and nothing else: data follow from it."""

    settings: Settings
    engine: Engine
    schedule: Schedule
    batches: DatasetBatches | LoaderBatches
    total: int
    evaluate: Callable[[], dict[str, float]] | None
    folder: RunFolder | None
    log: Log = field(init=False)
    step: int = 0
    best: dict[str, Any] | None = None
    line: dict[str, Any] = field(default_factory=dict)  # the last logged one

    def __post_init__(self) -> None:
        self.meter, self.clock = Meter(self.engine.device), Clock()

    def resume(self) -> None:
        """Goes to the newest checkpoint that can be read, or the start.

        Raises SettingsError if the folder's run was started otherwise, CheckpointError if all are damaged.
        """
        if self.folder is not None:
            self._agree()
        damaged = []
        for path in self.folder.found() if self.folder else []:
            try:
                self._load(self.engine.load(path))
            except CheckpointError as error:
                logger.warning("%s cannot be used, going back to the one before: %s", path, error)
                damaged.append(path)
                continue
            self.folder.set_aside(damaged)
            logger.info("going on from %s", path)
            return
        if damaged:
            raise CheckpointError(f"all checkpoints in {self.folder.checkpoints} are damaged: choose a new run_folder")
        rng.seed_all(self.settings.seed, distributed.rank())

    def _agree(self) -> None:
        """What decides the result is what the run was started with. The length may change if no rate depends on it."""
        record = {
            "optimizer": type(self.engine.optimizer).__name__,
            "samples": self.batches.samples,
            "world_size": distributed.world_size(),
            "total_steps": self.total,
            **self.settings.record(),
            "lr": self.schedule.groups[0],
            "group_ratios": self.schedule.ratios,
        }
        free = FREE | {"epochs", "steps"}
        if not self.schedule.own or (self.settings.lr_decay == "constant" and not 0 < self.settings.warm_up < 1):
            free |= {"total_steps"}
        self.folder.agree(record, free)

    def open_log(self) -> Log:
        """The log, continued after the step that was resumed from; close it."""
        file = self.folder.log if self.folder else None
        progress, tensorboard = self.settings.progress, self.settings.tensorboard
        self.log = Log(file, self.total, self.step, progress=progress, tensorboard=tensorboard)
        return self.log

    def where(self) -> str:
        """For whoever stopped the run: how to go on."""
        done = f"stopped after step {self.step} of {self.total}"
        if self.folder is None:
            return f"{done}; nothing was saved, for there is no run_folder"
        return f"{done}; run the same command to go on from {self.folder.path}"

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "best": self.best,
            "line": self.line,
            "seconds": self.clock.seconds(),
            "meter": self.meter.state(),
            "schedule": self.schedule.state(),
            "rng": rng.get_state(self.engine.device),
        }

    def _load(self, state: dict[str, Any]) -> None:
        self.step, self.best, self.line = state["step"], state["best"], state["line"]
        self.clock.earlier = state["seconds"]
        self.meter.load(state["meter"])
        self.schedule.load(state["schedule"])
        rng.set_state(state["rng"], self.engine.device)

    def save(self) -> None:
        """Writes a checkpoint of this step, and removes the oldest beyond `keep`. Raises DiskFull, TrainingDiverged."""
        if self.folder is None:
            return
        with self.clock.pause():
            self.meter.check(self.step)
            self.log.sync()
            self.engine.save(self.folder.checkpoint(self.step), self._state())
            self.folder.prune(self.settings.keep)

    def judge(self) -> dict[str, float]:
        """The numbers of the evaluation."""
        with self.clock.pause():
            return {name: float(value) for name, value in self.evaluate().items()}

    def write_line(self, epoch: int, lr: float, numbers: dict[str, float] | None) -> None:
        """Logs this step. `loss` is the mean since the last line. Raises TrainingDiverged, DiskFull."""
        line = {"step": self.step, "epoch": epoch, **self.meter.read(self.step), "lr": lr}
        norm = float(self.engine.grad_norm)
        line["grad_norm"] = norm if math.isfinite(norm) else None  # JSON holds finite numbers only
        line |= self.clock.read()
        if numbers is not None:
            line["eval"] = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self.line = line
        self.log.write(self.line)

    def consider(self, numbers: dict[str, float]) -> None:
        """Keeps the weights in best/ if they are the best so far. Raises SettingsError, DiskFull."""
        name = self.settings.best
        if name not in numbers:
            if name == "loss":
                return
            raise SettingsError(f"best={name!r}, but the evaluation gives {', '.join(numbers)}: choose one of them")
        before = self.best["value"] if self.best and self.best["name"] == name else None
        value = numbers[name]
        better = before is None or (value > before if self.settings.maximise else value < before)
        if not better or math.isnan(value):
            return
        self.best = {"name": name, "value": value, "step": self.step}
        if self.folder is not None:
            self.export(self.folder.best)
            if self.folder.writes:
                text = json.dumps({"step": self.step, **numbers}, indent=2) + "\n"
                self.folder.write_text(self.folder.best / "metrics.json", text)

    def finish(self) -> None:
        """Writes the weights and their config into the run folder. Raises DiskFull."""
        if self.folder is not None:
            self.export(self.folder.path)

    def finished(self) -> dict[str, Any]:
        """The last logged numbers of a run that has nothing left to do."""
        if not self.folder.model.exists():
            self.finish()
        logger.info("this run is finished: %d steps in %s", self.step, self.folder.path)
        return self.line

    def export(self, folder: Path) -> None:
        """Writes the whole weights and their config into `folder`. Raises DiskFull."""
        if self.folder.writes:
            folder.mkdir(exist_ok=True)
            config = model_config(self.engine.model)
            if config is not None:
                self.folder.write_text(folder / "config.json", config)
        self.engine.export(folder / "model.safetensors")
