"""File formats: read what was published, load it strictly, write safetensors. Nothing in a file is ever executed."""

from __future__ import annotations

from zoo.weights.atomic import atomic_file, atomic_folder, copy_file, is_full
from zoo.weights.blank import blank, uncollected
from zoo.weights.load import load
from zoo.weights.read import read, read_config
from zoo.weights.write import write

__all__ = [
    "atomic_file",
    "atomic_folder",
    "blank",
    "copy_file",
    "is_full",
    "load",
    "read",
    "read_config",
    "uncollected",
    "write",
]
