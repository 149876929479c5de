"""Model + batches -> trained weights. The names below are loaded when first used."""

from __future__ import annotations

import importlib

_ROOM_OF = {"Trainer": "trainer", "Settings": "settings"}
__all__ = sorted(_ROOM_OF)


def __getattr__(name: str) -> object:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
