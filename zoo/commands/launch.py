"""`zoo launch`: a script as several processes, on this machine and others."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from zoo.training.launch import start

EXAMPLES = """\
examples:
  zoo launch --num-gpus 2 examples/train_clip.py --steps 50      two processes here, on CPUs too
  zoo launch --hostfile hostfile examples/train_clip.py          on the machines of a hostfile, over ssh
  zoo launch --num-gpus 2 -m zoo.examples.train_clip             a module

Ctrl-C, SIGTERM and SIGUSR1 reach every process, so that all save and leave with exit code 75; the same command then
goes on. When a process fails the others are ended, and its exit code is that of `zoo launch`.
"""


def register(commands: argparse._SubParsersAction, **settings: object) -> None:
    """Adds the command."""
    parser = commands.add_parser("launch", help="run a script in several processes", epilog=EXAMPLES, **settings)
    parser.add_argument("--hostfile", type=Path, help="lines `name slots=N`, one for each machine")
    parser.add_argument("--num-gpus", type=whole, help="processes on each machine (default: its slots, or its GPUs)")
    parser.add_argument("--num-nodes", type=whole, help="machines (default: all of the hostfile)")
    parser.add_argument("--node-rank", type=int, help="this machine's number, where each is started by hand")
    parser.add_argument("--master-addr", help="the first machine's address (default: found out)")
    parser.add_argument("--master-port", type=whole, help="the port on which the processes meet (default: a free one)")
    parser.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT is a module's name")
    parser.add_argument("script", metavar="SCRIPT", help="what to run")
    rest = parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="arguments of the script")
    rest.required = False  # or it would be named as missing where SCRIPT is
    parser.set_defaults(run=run)


def whole(text: str) -> int:
    """A whole number, 1 or more."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Starts the processes and waits for them."""
    command = [sys.executable, *(["-m"] if args.is_module else []), args.script, *args.rest]
    return start(
        command,
        hostfile=args.hostfile,
        num_gpus=args.num_gpus or (None if args.hostfile else gpus_here()),
        num_nodes=args.num_nodes,
        node_rank=args.node_rank,
        master_addr=args.master_addr,
        master_port=args.master_port,
    )


def gpus_here() -> int:
    """The GPUs of this machine, 1 where there is none."""
    import torch

    return torch.cuda.device_count() or 1
