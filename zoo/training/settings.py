"""What a run may be told. One number, one owner: each of these is said here and nowhere else."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from zoo.errors import SettingsError, nearest


def _free(default: Any) -> Any:
    """A setting that changes how a run is watched or stored, not what it computes: it may differ when resuming."""
    return field(default=default, metadata={"free": True})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one run; the names are FlagAI's where it has them. Raises SettingsError at the door.

    What is computed: `lr=None` is the client optimizer's own rate, or 1e-3. `steps` are updates of the weights; give
    `steps` or `epochs`. `batch_size` is samples per process and micro-batch, so an update sees batch_size *
    gradient_accumulation_steps * processes. `warm_up` below 1 is a fraction of the run, from 1 on it is steps.
    `lr_floor` is a fraction of `lr`. `clip_grad=0` does not clip. `on_spike`: what becomes of an update whose loss
    stands out of the last ones: "keep" it, "skip" it, or "rollback" to the last checkpoint and pass over the data
    since; "rollback" does so too when losses stay not finite. `ema` is the decay of a moving average of the weights,
    which is then what is judged and exported; 0: none. `ema_start`: updates, or below 1 a part of all, before which
    there is none yet; None: from the first. `ema_offload`: it lies in the memory of the CPU. `about` is what else the
    run depends on and the trainer cannot see, such as which data: recorded, and the same when resuming.

    On what: `env_type` pytorch, pytorchDDP, deepspeed, or auto, which follows from the launcher. `num_gpus` processes
    on each of `num_nodes` machines, or on those of a `hostfile`, are started by `train` itself. `deepspeed_config`: a
    file, a dict, or a name of those that come with zoo. `reduce`: how DDP sends gradients: default, bf16, fp16, or
    powersgd:RANK. `timeout`: minutes that a collective may take; `heartbeat`: seconds of silence after which a rank is
    lost, 0: never.

    What is kept: `run_folder=None` writes nothing. `keep` checkpoints, the newest; `best` is the name of the evaluation
    number that chooses the weights in `best/`; any but "loss" needs `maximise` to say whether high is good.
    `async_save=None`: beside the training where there is memory for a copy. `time_limit`: minutes after which the run
    is suspended, with a checkpoint; `simulate_suspend`: a step at which it is, for trying that.
    """

    env_type: str = _free("pytorch")
    pytorch_device: Any = _free(None)
    experiment_name: str = _free("zoo")
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = _free(1)
    gradient_accumulation_steps: int = _free(1)
    lr: float | None = None
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warm_up: float = 0.1
    lr_decay: str = "cosine"
    lr_floor: float = 0.0
    clip_grad: float = 1.0
    on_spike: str = _free("keep")
    ema: float = 0.0
    ema_start: float | None = None
    ema_offload: bool = _free(False)
    precision: str = "fp32"
    checkpoint_activations: bool = _free(False)
    compile: bool = _free(False)
    find_unused_parameters: bool = _free(False)
    reduce: str = "default"
    deepspeed_config: Any = _free(None)
    num_gpus: int | None = _free(None)
    num_nodes: int = _free(1)
    hostfile: str | Path | None = _free(None)
    master_ip: str | None = _free(None)
    master_port: int | None = _free(None)
    timeout: float = _free(30.0)
    heartbeat: float = _free(20.0)
    seed: int = 1234
    num_workers: int = _free(0)
    log_interval: int = _free(100)
    eval_interval: int = _free(1000)
    save_interval: int = _free(1000)
    keep: int = _free(3)
    async_save: bool | None = _free(None)
    best: str = _free("loss")
    maximise: bool | None = _free(None)
    run_folder: str | Path | None = _free(None)
    time_limit: float | None = _free(None)
    simulate_suspend: int | None = _free(None)
    about: dict[str, Any] = field(default_factory=dict)
    layer_norms: bool = _free(False)
    tensorboard: bool = _free(False)
    wandb: bool = _free(False)
    progress: bool = _free(True)

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation_steps", "keep"):
            self._whole(name, 1)
        for name in ("log_interval", "eval_interval", "save_interval"):
            self._whole(name, 1)
        for name in ("epochs", "steps", "num_gpus", "master_port", "simulate_suspend"):
            if getattr(self, name) is not None:
                self._whole(name, 1)
        self._whole("num_nodes", 1)
        self._whole("num_workers", 0)
        self._whole("seed", 0)
        self._choice("precision", ("fp32", "bf16", "fp16"))
        self._choice("lr_decay", ("cosine", "linear", "constant"))
        if not re.fullmatch(r"default|bf16|fp16|powersgd(:[1-9]\d*)?", str(self.reduce)):
            raise SettingsError(
                f"reduce={self.reduce!r}: choose default, bf16, fp16, or powersgd with its rank, as powersgd:4"
            )
        self._choice("on_spike", ("keep", "skip", "rollback"))
        for name in ("weight_decay", "warm_up", "clip_grad", "eps", "timeout", "heartbeat"):
            self._between(name, 0, float("inf"))
        if not _is_decay(self.ema):
            raise SettingsError(f"ema={self.ema!r}: a decay from 0 to below 1, such as 0.999; 0 keeps no average")
        if self.ema_start is not None:
            self._between("ema_start", 0, float("inf"))
        if not self.ema and (self.ema_start is not None or self.ema_offload):
            raise SettingsError("ema_start and ema_offload are about an average of the weights: give ema too, as 0.999")
        if self.time_limit is not None:
            self._between("time_limit", 0, float("inf"))
        if self.on_spike == "rollback" and self.run_folder is None:
            raise SettingsError("on_spike='rollback' goes back to a checkpoint: give a run_folder")
        self._between("lr_floor", 0, 1)
        if self.lr is not None:
            self._between("lr", 0, float("inf"))
        if not isinstance(self.betas, (list, tuple)) or len(self.betas) != 2 or not all(map(_is_decay, self.betas)):
            raise SettingsError(f"betas={self.betas!r}: give two numbers from 0 to below 1, as (0.9, 0.999)")
        if self.epochs is not None and self.steps is not None:
            raise SettingsError(f"epochs={self.epochs} and steps={self.steps}: give one of them, the other follows")
        try:
            json.dumps(self.about)
        except (TypeError, ValueError) as error:
            raise SettingsError(
                f"about={self.about!r} cannot be written as JSON ({error}): keep text and numbers"
            ) from error
        if self.best != "loss" and self.maximise is None:
            raise SettingsError(f"best={self.best!r}: say maximise=True if a high number is good, else maximise=False")

    def _whole(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise SettingsError(f"{name}={value!r}: give a whole number, {least} or more")

    def _between(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            upper = "" if high == float("inf") else f" to {high}"
            raise SettingsError(f"{name}={value!r}: give a number from {low}{upper}")

    def _choice(self, name: str, known: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in known:
            raise SettingsError(f"{name}={value!r}: choose one of {', '.join(known)}")

    def record(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["betas"] = list(self.betas)
        return {name: str(v) if isinstance(v, (Path, torch.device)) else v for name, v in plain.items()}


def _is_decay(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value < 1


FREE = frozenset(f.name for f in fields(Settings) if f.metadata.get("free"))
_NAMES = tuple(f.name for f in fields(Settings))


def from_words(words: dict[str, Any]) -> Settings:
    """Keywords -> Settings. Takes FlagAI's other words too, where they mean something. Unknown -> SettingsError."""
    words = dict(words)
    words.pop("training_script", None)  # a run starts its own command again
    if words.pop("deepspeed_activation_checkpointing", False):
        words["checkpoint_activations"] = True
    if words.pop("model_parallel_size", 1) != 1:
        raise SettingsError(
            "model_parallel_size: there is none here; ZeRO 3 shares the weights out: env_type='deepspeed'"
        )
    if words.pop("fp16", False) and words.setdefault("precision", "fp16") != "fp16":
        raise SettingsError(f"fp16=True and precision={words['precision']!r}: give one of them")
    if "save_dir" in words:
        save_dir = words.pop("save_dir")
        if words.setdefault("run_folder", save_dir) != save_dir:
            raise SettingsError(f"save_dir={save_dir!r} and run_folder={words['run_folder']!r}: give one of them")
    if words.get("load_dir", "") is None:
        del words["load_dir"]
    for name in words:
        if name == "load_dir":
            raise SettingsError("load_dir: a run resumes by itself when it is started again with the same run_folder")
        if name not in _NAMES:
            raise SettingsError(f"no setting {name!r}; {nearest(name, _NAMES)}")
    return Settings(**words)


_WHY = {
    "samples_per_update": " It is batch_size * gradient_accumulation_steps * processes: change these together.",
    "total_steps": " It follows from steps or epochs; it may change if lr_decay='constant' and warm_up is in steps.",
    "samples": " The training data are not the same.",
}


def differs(name: str, before: Any, now: Any) -> SettingsError:
    """The error of a run folder that was started with another value."""
    return SettingsError(
        f"{name}: this run folder was started with {before!r}, now it is {now!r}. "
        f"Set it back to {before!r} to go on, or choose a new run_folder.{_WHY.get(name, '')}"
    )
