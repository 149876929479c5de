"""The options that every training script has, and what a Trainer makes of them: said once, for all of examples/."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_FREE_NAMES = {"workers": "num_workers", "device": "pytorch_device", "accumulate": "gradient_accumulation_steps"}


def add_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Adds the options in three groups; `defaults` are by the name of the option, as run_folder="runs/clip"."""
    training = parser.add_argument_group("training")
    length = training.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="updates of the weights")
    length.add_argument("--epochs", type=int, help="passes over the data")
    training.add_argument("--batch-size", type=int, help="samples per process, at a time (%(default)s)")
    training.add_argument("--accumulate", type=int, default=1, help="such batches per update (%(default)s)")
    training.add_argument("--lr", type=float, help="highest learning rate (%(default)s)")
    training.add_argument("--weight-decay", type=float, default=0.1, help="(%(default)s)")
    training.add_argument("--warm-up", type=float, default=0.1, help="steps, or below 1 a part of all (%(default)s)")
    training.add_argument("--clip-grad", type=float, default=1.0, help="largest norm of a gradient (%(default)s)")
    training.add_argument("--ema", type=float, default=0.0, help="decay of an average of the weights, as 0.999")
    training.add_argument("--ema-start", type=float, help="steps, or below 1 a part of all, until then (the first)")
    training.add_argument("--ema-offload", action="store_true", help="the average in the CPU's memory")
    choices = ("keep", "skip", "rollback")
    training.add_argument("--on-spike", default="keep", choices=choices, help="if the loss jumps (%(default)s)")
    training.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"), help="(%(default)s)")
    training.add_argument("--checkpoint-activations", action="store_true", help="less memory, a third more time")
    training.add_argument("--compile", action="store_true", help="torch.compile the model")
    training.add_argument("--seed", type=int, default=1234, help="(%(default)s)")

    where = parser.add_argument_group("where it runs")
    kinds = "pytorch, pytorchDDP, deepspeed, or auto, which follows from the launcher (%(default)s)"
    where.add_argument("--env-type", default="auto", help=kinds)
    where.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda if there is one")
    where.add_argument("--num-gpus", type=int, help="processes on this machine, which the script starts itself")
    where.add_argument("--num-nodes", type=int, default=1, help="machines of the hostfile (%(default)s)")
    where.add_argument("--hostfile", type=Path, help="machines to start processes on, lines of: NAME slots=N")
    where.add_argument("--master-port", type=int, help="where processes meet; default: a free one")
    where.add_argument("--deepspeed-config", help="how DeepSpeed shards: a file, or zero1 ... zero3_nvme (zero2)")
    where.add_argument("--reduce", default="default", help="DDP's gradients: default, bf16, fp16, powersgd:RANK")
    where.add_argument("--workers", type=int, default=0, help="processes that read data, for each (%(default)s)")
    # DeepSpeed's launcher and older ones of torch pass it; the rank is in the environment.
    where.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)

    kept = parser.add_argument_group("what it leaves")
    kept.add_argument("--run-folder", type=Path, help="all that it writes; goes on with what is there (%(default)s)")
    kept.add_argument("--log-interval", type=int, default=20, help="steps between lines of the log (%(default)s)")
    kept.add_argument("--eval-interval", type=int, default=200, help="steps between evaluations (%(default)s)")
    kept.add_argument("--save-interval", type=int, default=200, help="steps between checkpoints (%(default)s)")
    kept.add_argument("--keep", type=int, default=3, help="checkpoints that are kept (%(default)s)")
    kept.add_argument("--time-limit", type=float, help="minutes until it saves and leaves, with exit code 75")
    kept.add_argument("--simulate-suspend", type=int, metavar="STEP", help="do that at a step, to try it")
    kept.add_argument("--layer-norms", action="store_true", help="log the norm of each parameter's gradient")
    kept.add_argument("--tensorboard", action="store_true")
    kept.add_argument("--wandb", action="store_true")
    parser.set_defaults(**defaults)


def trainer_words(args: argparse.Namespace) -> dict[str, Any]:
    """What the options say, as keywords of a Trainer."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    names = {action.dest for action in parser._actions} - {"help", "local_rank"}
    return {_FREE_NAMES.get(name, name): getattr(args, name) for name in sorted(names)}
