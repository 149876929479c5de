"""One run under way: where it is, what it has summed up, and how that is stored and found again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zoo import distributed
from zoo.distributed import Channel, share_buffers
from zoo.errors import CheckpointError, SettingsError, Suspended, TrainingDiverged

from . import rng, state_file
from .batches import DatasetBatches, LoaderBatches
from .checkpoint import Checkpoint, Pieces, Snapshot, export, own_share
from .costs import Costs
from .ema import Ema
from .engines import Engine
from .engines.base import EMA, WEIGHTS, canonical_names
from .guard import Guard
from .log import Clock, Log, Meter, logger
from .run_folder import RunFolder, model_config
from .saver import Saver
from .schedule import Schedule, warm_up_steps
from .settings import FREE, Settings
from .stop_request import StopRequest, is_ctrl_c

MOST_BACK = 3  # times that a run goes back to the same checkpoint


@dataclass(kw_only=True)
class Run:
    """What changes while a run goes on. The position is `step`, updates done, and `skipped`, updates whose data were
    passed over when the run went back; the data follow from these two.

    `client` is what the user wants kept: a dict, or anything with state_dict() and load_state_dict().
    """

    settings: Settings
    engine: Engine
    schedule: Schedule
    batches: DatasetBatches | LoaderBatches
    total: int
    evaluate: Callable[[], dict[str, float]] | None
    folder: RunFolder | None
    client: Any = None
    log: Log = field(init=False)
    step: int = 0
    skipped: int = 0
    best: dict[str, Any] | None = None
    line: dict[str, Any] = field(default_factory=dict)  # the last logged one

    def __post_init__(self) -> None:
        settings, engine = self.settings, self.engine
        self.channel = Channel()
        self.meter, self.clock, self.costs = Meter(engine.device), Clock(), Costs(engine.device)
        self.guard = Guard(settings.on_spike, settings.gradient_accumulation_steps, self.channel)
        start = warm_up_steps(settings.ema_start or 0, self.total)
        self.ema = Ema(settings.ema, engine, start, settings.ema_offload) if settings.ema else None
        self.saver = Saver(settings.async_save, after=lambda: self.folder.prune(settings.keep))
        self.order = canonical_names(engine.model)
        self.moved, self.last_back, self.layers, self.said = False, (-1, 0), {}, {}

    def open_stop(self) -> StopRequest:
        """Listens for requests to stop; open it."""
        return StopRequest(self.channel, folder=self.folder and self.folder.path, minutes=self.settings.time_limit)

    def micro_batches(self) -> Iterator[tuple[int, Any]]:
        """(epoch, batch) from where the run is to its end, also when it goes back on the way."""
        micro = self.settings.gradient_accumulation_steps
        while self.step < self.total:
            self.moved = False
            first, last = ((self.skipped + step) * micro for step in (self.step, self.total))
            for epoch, batch in self.clock.waiting(self.batches.between(first, last)):
                yield epoch, batch
                if self.moved:
                    break

    # --- where it goes on --------------------------------------------------------------------------------------------
    def resume(self) -> None:
        """Goes to the newest checkpoint that can be read, or the start.

        Raises SettingsError if the folder's run was started otherwise, CheckpointError if all are damaged.
        """
        if self.folder is not None:
            self._agree()
        rng.seed_all(self.settings.seed, distributed.rank())
        if (path := self._load_newest()) is not None:
            logger.info("going on from %s", path)
            self.said = {"resumed_from": self.step}

    def _load_newest(self) -> Path | None:
        """Takes over the newest checkpoint that can be read; those that cannot are renamed. None if there is none."""
        damaged = []
        for path in self._found():
            try:
                self._load(Checkpoint(path, self.channel))
            except CheckpointError as error:
                logger.warning("%s cannot be used, going back to the one before: %s", path, error)
                damaged.append(path)
                continue
            self.channel.exchange()
            self.folder.set_aside(damaged)
            return path
        if damaged:
            raise CheckpointError(f"all checkpoints in {self.folder.checkpoints} are damaged: choose a new run_folder")
        return None

    def _found(self) -> list[Path]:
        """The checkpoints that rank 0 sees, newest first: all ranks must take the same."""
        names = self.channel.exchange([path.name for path in self.folder.found()] if self.folder else [])[0]
        return [self.folder.checkpoints / name for name in names]

    def _agree(self) -> None:
        """What decides the result is what the run was started with. The length may change if no rate depends on it, and
        the processes if an update sees as many samples."""
        settings, world = self.settings, distributed.world_size()
        name = type(self.engine.optimizer).__name__
        record = {
            "optimizer": "AdamW" if name == "DeepSpeedCPUAdam" else name,
            "samples": self.batches.samples,
            "samples_per_update": settings.batch_size * settings.gradient_accumulation_steps * world,
            "samples_together": settings.batch_size * world,
            "world_size": world,
            "total_steps": self.total,
            **settings.record(),
            "lr": self.schedule.groups[0],
            "group_ratios": self.schedule.ratios,
        }
        free = FREE | {"epochs", "steps", "world_size", "samples_together"}
        rates_stay = not self.schedule.own or (settings.lr_decay == "constant" and not 0 < settings.warm_up < 1)
        if rates_stay and not 0 < (settings.ema_start or 0) < 1:
            free |= {"total_steps"}
        self.folder.agree(record, free, self.channel)

    def go_back(self) -> bool:
        """To the last checkpoint, passing over the data since. False without one: there is nothing to take back.

        Raises TrainingDiverged when it keeps going back to the same one.
        """
        self.saver.wait()
        passed, (before, times) = self.step + self.skipped, self.last_back
        if self._load_newest() is None:
            return False
        self.last_back = (self.step, times + 1 if before == self.step else 1)
        if self.last_back[1] > MOST_BACK:
            raise TrainingDiverged(
                f"went back to step {self.step} {MOST_BACK} times: lower lr, lengthen warm_up, or look at the data"
            )
        self.skipped, self.moved = passed - self.step, True
        self.said = {"rolled_back_to": self.step}
        logger.warning("went back to step %d; the data of %d updates are passed over in all", self.step, self.skipped)
        self.log.cut(self.step)
        return True

    def _load(self, checkpoint: Checkpoint) -> None:
        """Raises CheckpointError, WeightsMismatch."""
        self.engine.restore(checkpoint)
        state = checkpoint.shared
        self.step, self.skipped = state["step"], state["skipped"]
        self.best, self.line = state["best"], state["line"]
        self.clock.go_on(state["seconds"])
        self.schedule.load(state["schedule"])
        self.guard.load(state["guard"])
        if self.ema:
            self.ema.restore(checkpoint, state["ema"])
        state_file.give_back(self.client, state["client"])
        own = checkpoint.own
        if checkpoint.world_size == distributed.world_size():
            self.meter.load(own["meter"])
            rng.set_state(own["rng"], self.engine.device)
        else:
            self.meter.restart()
            rng.seed_all(self.settings.seed, distributed.rank(), self.step)

    def open_log(self) -> Log:
        """The log, continued after the step that was resumed from; close it."""
        words: dict[str, Any] = {name: getattr(self.settings, name) for name in ("progress", "tensorboard")}
        words["wandb"] = self.settings.experiment_name if self.settings.wandb else None
        self.log = Log(self.folder and self.folder.log, self.total, self.step, **words)
        return self.log

    def stopped(self, reason: str) -> BaseException:
        """What to raise for it, which says how to go on: KeyboardInterrupt for Ctrl-C, else Suspended."""
        saved = f"run the same command to go on from {self.folder.path}" if self.folder else "nothing was saved"
        done = f"stopped by {reason} after step {self.step} of {self.total}; {saved}"
        if distributed.rank() == 0:
            logger.warning("%s", done)
        return KeyboardInterrupt(done) if is_ctrl_c(reason) else Suspended(done)

    # --- what it leaves ----------------------------------------------------------------------------------------------
    def save(self) -> None:
        """Starts a checkpoint of this step. Raises DiskFull, TrainingDiverged, CheckpointError."""
        if self.folder is not None:
            with self.clock.pause():
                self.meter.check(self.step)
                self.log.sync()
                self.saver.save(self.folder.checkpoint(self.step), self._snapshot())

    def pieces(self) -> Pieces:
        """What this rank writes of the weights, their average and the optimizer."""
        pieces = self.engine.pieces() | ({EMA: self.ema.pieces} if self.ema else {})
        return own_share(pieces, distributed.rank(), distributed.world_size()) if self.engine.replicated else pieces

    def _snapshot(self) -> Snapshot:
        engine = self.engine
        share_buffers(engine.model)
        own = {
            "engine": engine.extra() if distributed.rank() == 0 or not engine.replicated else None,
            "rng": rng.get_state(engine.device),
            "meter": self.meter.state(),
        }
        shared = {
            "step": self.step,
            "skipped": self.skipped,
            "best": self.best,
            "line": self.line,
            "seconds": self.clock.seconds(),
            "schedule": self.schedule.state(),
            "guard": self.guard.state(),
            "ema": {"updates": self.ema.updates} if self.ema else None,
            "client": state_file.taken(self.client),
        }
        return Snapshot(self.pieces(), own, shared)

    def look_at_layers(self) -> None:
        """The norms of each parameter's gradient, before the update that will be logged with them."""
        due = self.settings.layer_norms and (self.step + 1) % self.settings.log_interval == 0
        self.layers = self.engine.layer_norms() if due and self.engine.due else self.layers

    def judge(self) -> dict[str, float]:
        """The numbers of the evaluation."""
        share_buffers(self.engine.model)
        with self.clock.pause(), self.ema.shown() if self.ema else nullcontext():
            return {name: float(value) for name, value in self.evaluate().items()}

    def write_line(self, epoch: int, lr: float, numbers: dict[str, float] | None) -> None:
        """Logs this step. `loss` is the mean since the last line. Raises TrainingDiverged, DiskFull."""
        line = {"step": self.step, "epoch": epoch, **self.meter.read(self.step), "lr": lr}
        norm = float(self.engine.grad_norm)
        line["grad_norm"] = norm if math.isfinite(norm) else None  # JSON holds finite numbers only
        figures = self.engine.figures()
        line |= self.clock.read(figures.pop("comm_s", None)) | figures
        if distributed.is_distributed():
            line["rank_samples_per_s"] = self.channel.exchange(self.clock.working_rate)
        line |= self.costs.read(self.clock.rate, self.settings.precision)
        if self.skipped:
            line["skipped"] = self.skipped
        if self.layers:
            line["layer_norms"] = {name: norm if math.isfinite(norm) else None for name, norm in self.layers.items()}
        if numbers is not None:
            line["eval"] = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self.line, self.said = line | self.said, {}
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
        if self.folder is not None and not self.channel.exchange(self.folder.model.exists())[0]:
            self.finish()
        return self.line

    def export(self, folder: Path) -> None:
        """Writes the whole weights, or their average, and what they are loaded with into `folder`. Raises DiskFull."""
        share_buffers(self.engine.model)
        self.folder.describe(folder, model_config(self.engine.model))
        pieces = self.engine.pieces()[WEIGHTS] | (self.ema.pieces if self.ema else {})
        export(pieces, self.order, folder / "model.safetensors", self.channel, whole=self.engine.replicated)
