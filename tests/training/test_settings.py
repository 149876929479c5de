"""Settings fail at the door, by name, with the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.errors import SettingsError
from zoo.training import Trainer


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (dict(batchsize=4), "no setting 'batchsize'; nearest: batch_size"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(batch_size=True), "batch_size=True"),
        (dict(steps=0), "steps=0"),
        (dict(gradient_accumulation_steps=1.5), "gradient_accumulation_steps=1.5"),
        (dict(epochs=1, steps=2), "give one of them"),
        (dict(lr=-1), "lr=-1"),
        (dict(lr="1e-4"), "lr='1e-4'"),
        (dict(lr_decay="cosin"), "cosine, linear, constant"),
        (dict(lr_floor=2), "from 0 to 1"),
        (dict(precision="half"), "fp32, bf16, fp16"),
        (dict(fp16=True, precision="bf16"), "give one of them"),
        (dict(betas=(0.9, 1.0)), "betas"),
        (dict(best="R@1"), "maximise=True"),
        (dict(load_dir="runs/a"), "resumes by itself"),
        (dict(save_dir="a", run_folder="b"), "give one of them"),
        (dict(clip_grad=-1.0), "clip_grad"),
        (dict(num_workers=-1), "num_workers"),
        (dict(keep=0), "keep=0"),
        (dict(keep=None), "keep=None"),
        (dict(reduce="bf17"), "reduce='bf17': choose default, bf16, fp16, or powersgd"),
        (dict(reduce="powersgd:0"), "reduce='powersgd:0'"),
        (dict(reduce="powersgd:"), "as powersgd:4"),
        (dict(reduce=None), "reduce=None"),
        (dict(ema=1), "ema=1: a decay from 0 to below 1"),
        (dict(ema=-0.1), "0 keeps no average"),
        (dict(ema="0.9"), "ema='0.9'"),
        (dict(on_spike="back"), "keep, skip, rollback"),
        (dict(on_spike="rollback"), "give a run_folder"),
        (dict(num_gpus=0), "num_gpus=0"),
        (dict(num_nodes=0), "num_nodes=0"),
        (dict(master_port="29500"), "master_port='29500'"),
        (dict(timeout=-1), "timeout=-1"),
        (dict(heartbeat=None), "heartbeat=None"),
        (dict(time_limit=-1.0), "time_limit=-1.0"),
        (dict(simulate_suspend=0), "simulate_suspend=0"),
        (dict(betas=0.9), "betas=0.9: give two numbers"),
        (dict(lr=float("nan")), "lr=nan"),
    ],
    ids=str,
)
def test_each_fault_is_named(words, said):
    with pytest.raises(SettingsError) as error:
        Trainer(**words)
    assert said in str(error.value)


def test_flagais_words_are_understood():
    settings = Trainer(fp16=True, save_dir="runs/a", load_dir=None, experiment_name="clip").settings
    assert (settings.precision, settings.run_folder) == ("fp16", "runs/a")
    assert Trainer(fp16=False).settings.precision == "fp32"


def test_a_record_is_plain():
    import json

    import torch

    settings = Trainer(run_folder=Path("a"), pytorch_device=torch.device("cpu")).settings
    assert json.loads(json.dumps(settings.record())) == settings.record()
    assert settings.record()["pytorch_device"] == "cpu"


def test_constructing_starts_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Trainer(run_folder="run", pytorch_device="cuda:7")
    assert list(tmp_path.iterdir()) == []


def test_what_else_a_run_depends_on_must_be_the_same_when_resuming(toy, tmp_path):
    toy.train(tmp_path, about={"language": "en"})
    toy.train(tmp_path, about={"language": "en"})
    with pytest.raises(SettingsError, match="about.*zh.*new run_folder"):
        toy.train(tmp_path, about={"language": "zh"})
    with pytest.raises(SettingsError, match="about.*JSON"):
        Trainer(about={"data": object()})


@pytest.mark.parametrize("reduce", ["default", "bf16", "fp16", "powersgd", "powersgd:1", "powersgd:16"])
def test_each_way_to_send_gradients_is_taken(reduce):
    assert Trainer(reduce=reduce).settings.reduce == reduce
