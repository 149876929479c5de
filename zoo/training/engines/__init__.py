"""What runs one training step. `env_type` is read here and nowhere else."""

from __future__ import annotations

from importlib import import_module

from zoo.errors import SettingsError, nearest

from ..launch import find_place
from .base import Engine

_ENGINES = {
    "pytorch": lambda: import_module("zoo.training.engines.pytorch").PytorchEngine,
    "pytorchDDP": lambda: import_module("zoo.training.engines.ddp").DdpEngine,
    "deepspeed": lambda: import_module("zoo.training.engines.deepspeed").DeepspeedEngine,
}
AUTO = "auto"


def check_engine(name: str) -> None:
    """Raises SettingsError for an unknown `env_type`."""
    if name not in (AUTO, *_ENGINES):
        raise SettingsError(f"no env_type {name!r}; {nearest(str(name), (AUTO, *_ENGINES))}")


def find_engine(name: str, *, replicated: bool = False) -> type[Engine]:
    """The engine of an `env_type`, built as `Engine` says. Raises SettingsError.

    "auto" is DeepSpeed under its own launcher, DDP under any other that started several processes, else pytorch.
    `replicated`: one that holds the whole model on every rank, so DDP instead of DeepSpeed.
    """
    check_engine(name)
    if name == AUTO:
        place = find_place()
        alone = place is None or place.world_size == 1
        deepspeed = place and place.launcher == "deepspeed" and not replicated
        name = "deepspeed" if deepspeed else "pytorch" if alone else "pytorchDDP"
    elif name == "deepspeed" and replicated:
        raise SettingsError(
            "env_type='deepspeed': ZeRO shares out one model and one optimizer, and this training has two of each, and "
            "weighs one against the other by whole gradients. Use 'pytorchDDP', or 'auto', which takes it under the "
            "deepspeed launcher too"
        )
    return _ENGINES[name]()
