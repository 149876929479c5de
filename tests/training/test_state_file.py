"""Any nested state comes back as it was, without pickle."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from zoo.errors import CheckpointError, Suspended
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


class Counter:
    """An object that keeps its own state."""

    def __init__(self, seen: int = 0):
        self.seen = seen

    def state_dict(self) -> dict:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict) -> None:
        self.seen = state["seen"]


def test_a_clients_state_is_given_back_into_the_same_object():
    counter, words = Counter(), {"old": 1}
    state_file.give_back(counter, state_file.taken(Counter(7)))
    state_file.give_back(words, state_file.taken({"seen": 7}))
    assert counter.seen == 7 and words == {"seen": 7}
    state_file.give_back(None, {"seen": 7})


def test_where_nothing_was_taken_a_client_stays_as_it_is():
    """A run that began without state= goes on with one."""
    counter, words = Counter(3), {"seen": 3}
    for client in (counter, words):
        state_file.give_back(client, state_file.taken(None))
    assert counter.seen == 3 and words == {"seen": 3}


@pytest.mark.parametrize("kind", ["dict", "object"])
def test_a_clients_state_travels_through_suspend_and_resume(toy, tmp_path, kind):
    """It counts the batches that are trained on: with an interruption as many as without."""

    class Counts(toy.Net):
        def __init__(self, client):
            super().__init__()
            self.client = [client]

        def forward(self, x, y):
            (client,) = self.client
            if kind == "dict":
                client["seen"] = client.get("seen", 0) + 1
            else:
                client.seen += 1
            return super().forward(x, y)

    def trained(folder, **words) -> int:
        client = {} if kind == "dict" else Counter()
        try:
            toy.train(folder, Counts(client), call={"state": client}, **words)
        finally:
            found.append(client["seen"] if kind == "dict" else client.seen)

    found = []
    with pytest.raises(Suspended):
        trained(tmp_path / "a", simulate_suspend=5)
    trained(tmp_path / "a")
    trained(tmp_path / "b")
    assert found == [10, 24, 24]
