"""Any nested state (of an optimizer, a scheduler, the generators) -> tensors in safetensors, the rest in JSON.

Nothing is pickled, so nothing can be executed when it is read back. JSON has no tuples, no keys but strings and no
tensors: each is written as an object with one key that says what it was.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from zoo import weights
from zoo.errors import CheckpointError, WeightsError

_TENSOR, _TUPLE, _PAIRS = "=tensor", "=tuple", "=pairs"


def split(value: Any, tensors: dict[str, Tensor], name: str = "state") -> Any:
    """Nested state -> what JSON can hold; the tensors in it are put into `tensors`. Raises CheckpointError."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):05d}.{name}"
        tensors[name] = value.detach().cpu().contiguous()
        return {_TENSOR: name}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [split(item, tensors, f"{name}.{i}") for i, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if isinstance(value, dict):
        items = {key: split(item, tensors, f"{name}.{key}") for key, item in value.items()}
        plain = all(isinstance(key, str) and not key.startswith("=") for key in items)
        return items if plain else {_PAIRS: [[split(key, tensors, name), item] for key, item in items.items()]}
    raise CheckpointError(
        f"{name} is a {type(value).__name__}, which a checkpoint cannot hold: use tensors, numbers, text"
    )


def join(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """The reverse of split."""
    if isinstance(plain, list):
        return [join(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if _TENSOR in plain:
        return tensors[plain[_TENSOR]]
    if _TUPLE in plain:
        return tuple(join(plain[_TUPLE], tensors))
    if _PAIRS in plain:
        return {join(key, tensors): join(item, tensors) for key, item in plain[_PAIRS]}
    return {key: join(item, tensors) for key, item in plain.items()}


def write(state: Any, folder: Path, name: str) -> None:
    """Writes `name`.json and, for tensors, `name`.safetensors into the folder. Raises CheckpointError, DiskFull."""
    tensors: dict[str, Tensor] = {}
    plain = split(state, tensors)
    if tensors:
        weights.write(tensors, folder / f"{name}.safetensors")
    (folder / f"{name}.json").write_text(json.dumps({"tensors": len(tensors), "state": plain}), encoding="utf-8")


def read(folder: Path, name: str) -> Any:
    """What `write` wrote, tensors on the CPU. Raises CheckpointError if it is damaged."""
    try:
        plain = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        tensors = weights.read(folder / f"{name}.safetensors") if plain["tensors"] else {}
        return join(plain["state"], {key: tensor.clone() for key, tensor in tensors.items()})
    except (OSError, ValueError, KeyError, TypeError, WeightsError) as error:
        raise CheckpointError(f"{folder / name}.json is damaged ({error}): use another checkpoint") from error


def taken(client: Any) -> Any:
    """The state of a dict, or of anything with state_dict()."""
    return client.state_dict() if hasattr(client, "state_dict") else client


def give_back(client: Any, state: Any) -> None:
    """Puts what was taken back into it. Where nothing was taken it stays as it is."""
    if client is None or state is None:
        return
    if hasattr(client, "load_state_dict"):
        client.load_state_dict(state)
    else:
        client.clear()
        client.update(state)
