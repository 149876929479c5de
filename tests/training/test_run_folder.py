"""What lies in a run folder, and what is removed from it."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from torch import nn

from zoo.distributed import Channel
from zoo.errors import CheckpointError, SettingsError
from zoo.training.run_folder import RunFolder, model_config


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    return folder


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


def test_checkpoints_are_found_newest_first_and_nothing_else(folder):
    others = (".step-00000011.host.1.partial", "damaged-step-00000012")
    for name in ("step-00000002", "step-00000010", "step-100000000", *others):
        (folder.checkpoints / name).mkdir()
    assert [path.name for path in folder.found()] == ["step-100000000", "step-00000010", "step-00000002"]
    assert folder.checkpoint(10) == folder.found()[1]
    assert RunFolder(folder.path / "nowhere").found() == []


def test_the_newest_are_kept_and_half_removed_ones_go(folder):
    for step in (1, 2, 3, 4):
        folder.checkpoint(step).mkdir()
        (folder.checkpoint(step) / "state.json").touch()
    folder.checkpoint(9).with_name(".step-00000009.removed").mkdir()
    folder.prune(2)
    assert names(folder) == ["step-00000003", "step-00000004"]
    RunFolder(folder.path, writes=False).prune(1)
    assert len(names(folder)) == 2


def test_settings_are_written_once_and_compared(folder):
    channel = Channel()
    folder.agree({"lr": 1.0, "log": 1}, frozenset({"log"}), channel)
    folder.agree({"lr": 1.0, "log": 2}, frozenset({"log"}), channel)
    assert json.loads((folder.path / "settings.json").read_text()) == {"lr": 1.0, "log": 2}
    for changed in ({"lr": 2.0}, {}, {"lr": 1.0, "new": 3}):
        with pytest.raises(SettingsError, match="this run folder was started with"):
            folder.agree(changed, frozenset({"log"}), channel)
    (folder.path / "settings.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        folder.agree({}, frozenset(), channel)


def test_a_config_is_a_dataclass_or_a_dict():
    @dataclass(frozen=True)
    class Sizes:
        width: int = 8
        mean: tuple[float, float] = (0.5, 0.25)

    model = nn.Linear(1, 1)
    assert model_config(model) is None
    model.config = Sizes()
    assert json.loads(model_config(model)) == {"width": 8, "mean": [0.5, 0.25]}
    model.config = {"width": 9}
    assert json.loads(model_config(model)) == {"width": 9}
    model.config = {"model": object()}
    with pytest.raises(SettingsError, match="JSON"):
        model_config(model)
