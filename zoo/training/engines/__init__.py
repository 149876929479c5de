"""What runs one training step. `env_type` is read here and nowhere else."""

from __future__ import annotations

from zoo.errors import SettingsError, nearest

from .base import Engine
from .pytorch import PytorchEngine

_ENGINES = {"pytorch": PytorchEngine}
_NOT_YET = ("pytorchDDP", "deepspeed")


def find_engine(name: str) -> type[Engine]:
    """The engine of an `env_type`, built as `Engine` says. Raises SettingsError."""
    if name in _NOT_YET:
        raise SettingsError(f"env_type={name!r} is not there yet: use env_type='pytorch', one device in one process")
    if name not in _ENGINES:
        raise SettingsError(f"no env_type {name!r}; {nearest(str(name), _ENGINES)}")
    return _ENGINES[name]
