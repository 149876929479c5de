"""Every option of a training script reaches the setting of its name."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from zoo.training import Trainer
from zoo.training.options import add_options, trainer_words
from zoo.training.settings import Settings

# option and its value -> setting and its value; none is a default
OPTIONS = {
    "--steps 7": ("steps", 7),
    "--epochs 3": ("epochs", 3),
    "--batch-size 12": ("batch_size", 12),
    "--accumulate 4": ("gradient_accumulation_steps", 4),
    "--lr 3e-4": ("lr", 3e-4),
    "--weight-decay 0.02": ("weight_decay", 0.02),
    "--warm-up 20": ("warm_up", 20.0),
    "--clip-grad 0.5": ("clip_grad", 0.5),
    "--ema 0.99": ("ema", 0.99),
    "--ema-start 0.5": ("ema_start", 0.5),
    "--ema-offload": ("ema_offload", True),
    "--on-spike skip": ("on_spike", "skip"),
    "--precision bf16": ("precision", "bf16"),
    "--checkpoint-activations": ("checkpoint_activations", True),
    "--compile": ("compile", True),
    "--seed 5": ("seed", 5),
    "--env-type pytorchDDP": ("env_type", "pytorchDDP"),
    "--device cpu": ("pytorch_device", "cpu"),
    "--num-gpus 2": ("num_gpus", 2),
    "--num-nodes 3": ("num_nodes", 3),
    "--hostfile hosts": ("hostfile", Path("hosts")),
    "--master-port 29501": ("master_port", 29501),
    "--deepspeed-config zero3": ("deepspeed_config", "zero3"),
    "--reduce powersgd:4": ("reduce", "powersgd:4"),
    "--workers 2": ("num_workers", 2),
    "--run-folder runs/a": ("run_folder", Path("runs/a")),
    "--log-interval 11": ("log_interval", 11),
    "--eval-interval 12": ("eval_interval", 12),
    "--save-interval 13": ("save_interval", 13),
    "--keep 9": ("keep", 9),
    "--time-limit 1.5": ("time_limit", 1.5),
    "--simulate-suspend 6": ("simulate_suspend", 6),
    "--layer-norms": ("layer_norms", True),
    "--tensorboard": ("tensorboard", True),
    "--wandb": ("wandb", True),
}


def settings(*words: str, **defaults) -> Settings:
    parser = argparse.ArgumentParser()
    add_options(parser, **({"batch_size": 8, "ema": 0.9} | defaults))
    return Trainer(**trainer_words(parser.parse_args(words))).settings


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_reaches_its_setting_and_no_other(option):
    usual, told = settings().record(), settings(*option.split()).record()
    name, value = OPTIONS[option]
    assert usual[name] != told[name]
    assert told == usual | {name: str(value) if isinstance(value, Path) else value}


def test_no_option_is_missing_above():
    parser = argparse.ArgumentParser()
    add_options(parser)
    known = {word for action in parser._actions for word in action.option_strings}
    assert known - {"-h", "--help", "--local_rank", "--local-rank"} == {option.split()[0] for option in OPTIONS}


@pytest.mark.parametrize("words", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"]])
def test_what_launchers_pass_is_taken_and_changes_nothing(words):
    assert settings(*words) == settings()


def test_defaults_are_by_the_name_of_the_option():
    told = settings(run_folder="runs/clip", accumulate=3, workers=2, device="cpu", lr=1e-4)
    assert (told.run_folder, told.gradient_accumulation_steps, told.num_workers) == (Path("runs/clip"), 3, 2)
    assert (told.pytorch_device, told.lr) == ("cpu", 1e-4)
    assert settings("--lr", "1", lr=1e-4).lr == 1


def test_options_that_are_not_given_say_what_the_trainer_says():
    """But for how often it speaks and saves, which is for runs of minutes, and for env_type."""
    usual, told = Trainer(batch_size=8, ema=0.9).settings.record(), settings().record()
    differing = {name for name, value in told.items() if value != usual[name]}
    assert differing == {"env_type", "log_interval", "eval_interval", "save_interval"}


def test_options_of_the_script_are_left_to_it():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="clip")
    add_options(parser, batch_size=8)
    assert "model" not in trainer_words(parser.parse_args(["--model", "dalle"]))


def test_steps_and_epochs_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        settings("--steps", "1", "--epochs", "1")
    assert "not allowed with" in capsys.readouterr().err
