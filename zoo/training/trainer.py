"""The trainer: settings at the door, one visible loop behind it.

    trainer = Trainer(env_type="pytorch", epochs=5, batch_size=64, lr=1e-4, run_folder="runs/clip")
    trainer.train(model, train_dataset=pairs, collate_fn=collate_fn)

Any module whose forward(**batch) returns a dict with "loss" can be trained. The same command with the same run folder
goes on where it was stopped, or killed: on the CPU bit for bit as if it had not been.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from zoo import distributed
from zoo.errors import SettingsError

from .batches import Collate, DatasetBatches, LoaderBatches, evaluation_batches, length, open_batches
from .engines import Engine, check_engine, find_engine
from .evaluation import NOT_FOR_THE_MODEL, Metrics, evaluate_batches, judging, loss_of
from .launch import relaunch
from .log import logger
from .run import Run
from .run_folder import RunFolder, model_config
from .schedule import Schedule, lr_at, warm_up_steps
from .settings import Settings, from_words
from .state_file import split, taken
from .stop_request import StopRequest


class Trainer:
    """`Trainer(**settings)`, see `Settings`. `tokenizer` is handed to metrics that ask for it. `beside`: name -> file,
    what is to lie beside the weights wherever they are written, as the tokenizer's files. Raises SettingsError.

    To change what a forward step is, subclass and override `forward_step`.
    """

    def __init__(self, *, tokenizer: Any = None, beside: Mapping[str, str | Path] | None = None, **settings: Any):
        self.settings = from_words(settings)
        self.tokenizer, self.beside = tokenizer, beside
        check_engine(self.settings.env_type)
        self.step, self.total = 0, 0  # updates done, and all, for a forward_step that depends on them

    def forward_step(self, data: Any, model: nn.Module, mems: Any = None) -> Mapping[str, Any]:
        """One micro-batch on the device -> a dict with "loss", and "logits" if there are metrics. Override this one.

        `mems` is FlagAI's, and None.
        """
        if not isinstance(data, Mapping):
            raise SettingsError(
                f"a batch is a {type(data).__name__}, but the model is called with names: give a collate_fn that "
                "returns a dict, or override forward_step"
            )
        return model(**{name: value for name, value in data.items() if name not in NOT_FOR_THE_MODEL})

    def build(self, make: Callable[[], nn.Module]) -> nn.Module:
        """make(), the model to train, or a part of it; under ZeRO-3 in pieces, so that no process holds it whole.

            model = trainer.build(lambda: Dalle(config, dvae))
            trainer.train(model, ...)

        The weights are those that make() gives by itself: parameters may be shared, scaled or loaded, by AutoLoader
        too. Under ZeRO-3 a parameter is whole only from when make() touches it until it touches another, the model
        does not compute before `train`, and `numel()` of a parameter is 0. Every rank must make the same model. Starts
        processes as `train` does. Raises SettingsError, LaunchError, MissingPackage.
        """
        relaunch(self.settings)
        engine_type = self.engine_type()
        engine_type.join(self.settings)
        return engine_type.build(make, self.settings)

    def engine_type(self) -> type[Engine]:
        """What runs its steps. Raises SettingsError."""
        return find_engine(self.settings.env_type)

    def open_engine(self, engine_type: type[Engine], model: nn.Module, optimizer: Any, settings: Settings) -> Engine:
        """That, over the model."""
        return engine_type(model, optimizer, settings, self.forward_step)

    def train(
        self,
        model: nn.Module,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        train_dataset: Any = None,
        valid_dataset: Any = None,
        metric_methods: Metrics = (),
        collate_fn: Collate | None = None,
        find_unused_parameters: bool = False,
        *,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        state: Any = None,
    ) -> dict[str, Any]:
        """Trains, in place, and returns the last logged numbers: {"step", "loss", ..., "eval": {...}}.

        `optimizer`: a torch optimizer; a function model -> parameter groups, for AdamW; or None, for AdamW with our
        groups. `lr_scheduler`: a torch scheduler, stepped once per update; a function step -> lr; or None, for the
        schedule of the settings. `train_dataset`, `valid_dataset`: data sets, or ready DataLoaders, whose batch size
        and order then hold. `metric_methods`: [[name, fn(logits, labels, meta=..., tokenizer=...)], ...]. `evaluate`:
        model -> more numbers, logged and chosen by as the others are. `state`: a dict, or anything with state_dict()
        and load_state_dict(), that is to be kept in checkpoints and given back.

        Where the settings ask for more processes than this one, it starts them, waits, and ends with their exit code.

        Raises SettingsError, EmptyDataset, DeviceNotFound, DiskFull, CheckpointError, WeightsMismatch,
        TrainingDiverged, LaunchError; KeyboardInterrupt after saving, on Ctrl-C; and Suspended, a SystemExit, after
        saving for any other request to stop.
        """
        settings = self.settings
        settings = replace(settings, find_unused_parameters=find_unused_parameters or settings.find_unused_parameters)
        self._check_evaluation(valid_dataset, metric_methods, evaluate)
        model_config(model)
        split(taken(state), {})  # what no checkpoint can hold is said now, not at the first save
        relaunch(settings)
        engine_type = self.engine_type()
        engine_type.join(settings)
        if settings.checkpoint_activations:
            self._recompute(model)
        batches = open_batches(train_dataset, settings, collate_fn)
        engine = self.open_engine(engine_type, model, optimizer, settings)
        total = self.total = self._total_steps(batches)
        schedule = self._schedule(engine.group_lrs, lr_scheduler, total)

        folder = None
        if settings.run_folder is not None:
            folder = RunFolder(settings.run_folder, distributed.rank() == 0, self.beside)
        run = Run(
            settings=settings,
            engine=engine,
            schedule=schedule,
            batches=batches,
            total=total,
            evaluate=self._judge(engine, valid_dataset, metric_methods, collate_fn, evaluate),
            folder=folder,
            client=state,
        )
        with folder.alone(run.channel) if folder else nullcontext():
            run.resume()
            return self._loop(run)

    def _loop(self, run: Run) -> dict[str, Any]:
        """The loop. One turn is one micro-batch; `updated` comes once per update of the weights."""
        settings, engine = run.settings, run.engine
        if run.step >= run.total:
            return run.finished()
        engine.model.train()
        with run.open_stop() as stop, run.open_log(), run.saver:
            for epoch, batch in run.micro_batches():
                self.step = run.step
                with run.costs.counting(length(batch), possible=not settings.compile):
                    loss = loss_of(engine.forward(batch))
                engine.backward(run.guard.pass_on(loss))
                run.meter.add(loss)
                run.clock.samples += length(batch)
                lrs = run.schedule(run.step)
                run.look_at_layers()
                if engine.step(lrs):
                    self.updated(run, stop, epoch, lrs[0])
        return run.line

    def updated(self, run: Run, stop: StopRequest, epoch: int, lr: float) -> None:
        """What follows an update of the weights: averaging, judging, logging, saving. Raises as `train` does."""
        settings, engine = self.settings, run.engine
        run.step += 1
        self.step = run.step
        run.clock.updates += 1
        run.meter.close(engine.grad_norm)
        run.schedule.advance()
        run.log.tick()
        if run.ema:
            run.ema.update()
        if run.folder and not engine.swaps:
            run.saver.prepare(run.pieces)
        if run.guard.wants_back(engine.grad_norm) and run.go_back():
            return
        done = run.step == run.total
        judged = run.evaluate is not None and (done or run.step % settings.eval_interval == 0)
        numbers = run.judge() if judged else None
        if judged or done or run.step % settings.log_interval == 0:
            run.write_line(epoch, lr, numbers)
        if judged:
            run.consider(numbers)
        if done:
            run.finish()
        if run.step == settings.simulate_suspend:
            stop.simulate()
        reason = stop.agreed()
        if done or reason or run.step % settings.save_interval == 0:
            run.save()
        if reason and not done:
            run.saver.wait()
            stop.done()
            raise run.stopped(reason)

    def evaluate(
        self,
        model: nn.Module,
        dataset: Any,
        metric_methods: Metrics = (),
        collate_fn: Collate | None = None,
    ) -> dict[str, float]:
        """{"loss": the mean over samples, and a number per metric} of a data set or DataLoader, labels or not.

        The model's mode and all random numbers are after as they were before. Raises SettingsError, EmptyDataset.
        """
        engine_type = self.engine_type()
        engine_type.join(self.settings)
        engine = engine_type(model, None, self.settings, self.forward_step, trains=False)
        with judging(model, engine.device, self.settings.seed):
            batches = evaluation_batches(dataset, self.settings, collate_fn)
            return evaluate_batches(engine, batches, metric_methods, self.tokenizer)

    def _judge(
        self, engine: Engine, dataset: Any, metrics: Metrics, collate_fn: Collate | None, evaluate: Any
    ) -> Callable[[], dict[str, float]] | None:
        """What gives the numbers of an evaluation, if there is anything to evaluate with."""
        if dataset is None and evaluate is None:
            return None

        def numbers() -> dict[str, float]:
            found: dict[str, float] = {}
            with judging(engine.model, engine.device, self.settings.seed):
                if dataset is not None:
                    judged = evaluation_batches(dataset, self.settings, collate_fn)
                    found |= evaluate_batches(engine, judged, metrics, self.tokenizer)
                return found | evaluate(engine.model) if evaluate is not None else found

        return numbers

    def _check_evaluation(self, valid_dataset: Any, metric_methods: Metrics, evaluate: Any) -> None:
        best = self.settings.best
        known = ["loss", *(name for name, _ in metric_methods)] if valid_dataset is not None else []
        if metric_methods and valid_dataset is None:
            raise SettingsError("metric_methods need a valid_dataset to be measured on")
        if best != "loss" and evaluate is None and best not in known:
            raise SettingsError(
                f"best={best!r}, but the evaluation gives {', '.join(known) or 'nothing'}: choose of these"
            )

    @staticmethod
    def _recompute(model: nn.Module) -> None:
        if not hasattr(model, "set_grad_checkpointing"):
            raise SettingsError(
                f"checkpoint_activations=True, but {type(model).__name__} has no set_grad_checkpointing(): "
                "set it to False, or add the method"
            )
        model.set_grad_checkpointing(True)

    def _total_steps(self, batches: DatasetBatches | LoaderBatches) -> int:
        settings = self.settings
        if settings.steps is not None:
            return settings.steps
        if batches.per_epoch is None:
            raise SettingsError("the training data have no length, so epochs have no end: give steps")
        # A DataLoader's epoch may end within an update; micro-batches too few for one at the very end are left.
        return max(1, (settings.epochs or 1) * batches.per_epoch // settings.gradient_accumulation_steps)

    def _schedule(self, groups: list[float], client: Any, total: int) -> Schedule:
        settings, peak = self.settings, groups[0]
        if client is None and settings.lr is not None and settings.lr != peak:
            logger.warning("the optimizer says lr=%g and the trainer lr=%g, which holds", peak, settings.lr)
            groups = [lr * settings.lr / peak if peak else settings.lr for lr in groups]
        warm_up = warm_up_steps(settings.warm_up, total)
        lr_of = partial(
            lr_at, peak=groups[0], total=total, warm_up=warm_up, decay=settings.lr_decay, floor=settings.lr_floor
        )
        schedule = Schedule(groups, lr_of, client)
        split(schedule.state(), {})
        return schedule
