"""Files -> batches. The names below are loaded when first used, so that reading records needs no torch."""

from __future__ import annotations

import importlib

_ROOM_OF = {
    "RecordReader": "records",
    "RecordWriter": "records",
    "CsvDataset": "pairs",
    "FolderDataset": "pairs",
    "RecordDataset": "pairs",
    "collate_fn": "pairs",
    "open_image": "images",
    "pack_sample": "images",
    "unpack_sample": "images",
    "list_datasets": "datasets",
    "open_dataset": "datasets",
    "open_pictures": "datasets",
    "Distort": "augment",
    "Dequantize": "crops",
    "clip_train_transform": "transforms",
    "dalle_train_transform": "crops",
    "dvae_train_transform": "crops",
    "clip_transform": "transforms",
    "to_pictures": "transforms",
    "unit_transform": "transforms",
}
__all__ = sorted(_ROOM_OF)


def __getattr__(name: str) -> object:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_ROOM_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
