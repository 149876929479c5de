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


def test_what_is_kept_beside_lies_beside_all_weights_though_its_source_is_gone(tmp_path):
    source = tmp_path / "words.txt"
    source.write_text("a\nb\n")
    folder = RunFolder(tmp_path / "run", beside={"tokenizer/vocab.txt": source})
    folder.path.mkdir()
    folder.agree({}, frozenset(), Channel())
    source.unlink()
    folder.describe(folder.path, "{}")
    folder.describe(folder.best, None)
    RunFolder(folder.path, writes=False, beside=folder.beside).describe(tmp_path / "other", "{}")
    found = sorted(str(path.relative_to(folder.path)) for path in folder.path.rglob("*.[tj]*"))
    assert found == ["best/tokenizer/vocab.txt", "config.json", "settings.json", "tokenizer/vocab.txt"]
    assert (folder.best / "tokenizer/vocab.txt").read_text() == "a\nb\n" and not (tmp_path / "other").exists()


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


class Rank:
    """The channel of one of several ranks, which hears `heard` whatever it says."""

    def __init__(self, *heard):
        self.heard, self.said = list(heard), []

    def exchange(self, value=None):
        self.said.append(value)
        return self.heard.pop(0)


def test_two_runs_in_one_folder_are_refused_on_every_rank(folder):
    """Rank 0 tells the others, which look at no lock: they may be on other machines."""
    with folder.alone(Channel()):
        second, channel = RunFolder(folder.path), Rank([None, None])
        with pytest.raises(SettingsError, match="another process trains") as error, second.alone(Channel()):
            pytest.fail("entered")
        with RunFolder(folder.path, writes=False).alone(channel):
            assert channel.said == [None]
        with pytest.raises(SettingsError) as other:
            with RunFolder(folder.path, writes=False).alone(Rank([str(error.value), None])):
                pytest.fail("entered")
    assert str(other.value) == str(error.value)
    with folder.alone(Channel()):
        pass


def test_settings_that_differ_are_refused_on_every_rank(folder):
    folder.agree({"lr": 1.0}, frozenset(), Channel())
    with pytest.raises(SettingsError) as error:
        folder.agree({"lr": 2.0}, frozenset(), Channel())
    channel = Rank([str(error.value), None])
    with pytest.raises(SettingsError) as other:
        RunFolder(folder.path, writes=False).agree({"lr": 2.0}, frozenset(), channel)
    assert channel.said == [None] and str(other.value) == str(error.value)


def test_a_rank_that_sees_another_folder_is_named_by_all(folder):
    for writes in (True, False):
        with pytest.raises(SettingsError, match="rank 1 does not see .*settings.json.*all machines"):
            RunFolder(folder.path, writes).agree({"lr": 1.0}, frozenset(), Rank([None, None], [True, False]))


def test_more_processes_are_taken_if_an_update_is_the_same(folder, caplog):
    before = {"samples_per_update": 8, "samples_together": 4}
    folder.agree(before, frozenset({"samples_together"}), Channel())
    folder.agree(before, frozenset({"samples_together"}), Channel())
    assert caplog.text == ""
    folder.agree(before | {"samples_together": 8}, frozenset({"samples_together"}), Channel())
    assert "of all processes is 8 samples where it was 4" in caplog.text


def test_a_file_to_keep_beside_that_is_not_there_is_named(tmp_path):
    folder = RunFolder(tmp_path, beside={"vocab.txt": tmp_path / "gone.txt"})
    with pytest.raises(
        SettingsError, match=r"gone\.txt, which is to lie beside the weights as vocab\.txt, is not there"
    ):
        folder.agree({}, frozenset(), Channel())
