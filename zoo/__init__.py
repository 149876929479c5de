"""CLIP, DALL-E, CLIP-GEN and Stable Diffusion: load by name, generate, and train anywhere.

The public names are imported when they are first asked for, so `import zoo` costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.auto_loader import AutoLoader
    from zoo.catalog import list_models
    from zoo.optimization import optimize
    from zoo.training import Trainer

__all__ = ["AutoLoader", "Trainer", "__version__", "list_models", "optimize"]
__version__ = "0.1.0"

_ROOM_OF = {
    "AutoLoader": "zoo.auto_loader",
    "Trainer": "zoo.training",
    "list_models": "zoo.catalog",
    "optimize": "zoo.optimization",
}


def __getattr__(name: str) -> object:
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOM_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
