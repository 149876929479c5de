"""Any nested state comes back as it was, without pickle."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from zoo.errors import CheckpointError
from zoo.training import state_file


def test_a_nested_state_comes_back(tmp_path):
    state = {
        0: {"step": torch.tensor(3.0), "rows": [torch.arange(3, dtype=torch.uint8), None, True]},
        "0": (1, (2.5, "text"), ()),
        "=tensor": "not one",
        "infinite": float("inf"),
        "python": random.getstate(),
        "count": np.int64(7),
    }
    state_file.write(state, tmp_path, "state")
    back = state_file.read(tmp_path, "state")
    assert torch.equal(back[0].pop("step"), state[0].pop("step"))
    assert torch.equal(back[0]["rows"].pop(0), state[0]["rows"].pop(0))
    assert back == state
    assert isinstance(back["0"], tuple)


def test_a_state_without_tensors_is_one_file(tmp_path):
    state_file.write({"a": 1}, tmp_path, "state")
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]
    assert state_file.read(tmp_path, "state") == {"a": 1}


def test_what_cannot_be_held_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="state.groups.0.hook is a function"):
        state_file.write({"groups": [{"hook": lambda: None}]}, tmp_path, "state")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"state": {"=tensor": "gone"}, "tensors": 0}', "\x00\x01"])
def test_damage_is_a_checkpoint_error(tmp_path, text):
    (tmp_path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        state_file.read(tmp_path, "state")
