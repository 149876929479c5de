"""`zoo plan`: what a run will need, and which setup fits: before it starts, without weights and without a GPU."""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.commands.catalog import card_of
from zoo.commands.plan_batches import BATCHES, IN_PIECES
from zoo.commands.tables import as_json, in_bytes, in_millions, table
from zoo.errors import SettingsError

if TYPE_CHECKING:
    from torch import nn

    from zoo.training.memory import Machine, Plan, Setup, Sizes

EXAMPLES = """\
examples:
  zoo plan clip-base-p32-224 --batch-size 64
  zoo plan clip-huge-p14-224-laion2b --batch-size 32 --gpus 8 --gpu-memory 24GB --host-memory 256GB --precision bf16
  zoo plan dalle-12b --precision bf16 --checkpoint-activations --gpus 8 --gpu-memory 80GB --host-memory 512GB
  zoo plan --parameters 1.3e9 --layers 24 --width 2048 --context 1024 --gpu-memory 80GB --host-memory 512GB
"""


def register(commands: argparse._SubParsersAction, **settings: object) -> None:
    """Adds the command."""
    parser = commands.add_parser("plan", help="what a run will need, and what fits", epilog=EXAMPLES, **settings)
    parser.add_argument("name", metavar="NAME", nargs="?", help="a name that `zoo list` shows; or, in its place,")
    parser.add_argument("--parameters", type=count, metavar="N", help="parameters of a transformer, such as 12.3e9")
    parser.add_argument("--layers", type=count, metavar="N", help="its layers")
    parser.add_argument("--width", type=count, metavar="N", help="its width")
    parser.add_argument("--context", type=count, metavar="N", help="its tokens per sample")
    parser.add_argument("--task", help="only needed for a name of several tasks")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="per process and micro-batch")
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help="micro-batches per update")
    parser.add_argument("--precision", default="fp32", help="fp32, bf16 or fp16 (default: %(default)s)")
    parser.add_argument("--checkpoint-activations", action="store_true", help="compute them twice, keep few")
    parser.add_argument("--ema", action="store_true", help="keep a moving average of the weights")
    parser.add_argument("--ema-offload", action="store_true", help="the same, in the hosts' memory")
    parser.add_argument("--keep", type=int, default=3, metavar="N", help="checkpoints (default: %(default)s)")
    parser.add_argument("--gpus", type=int, metavar="N", help="on each machine (default: this machine's)")
    parser.add_argument("--machines", type=int, default=1, metavar="N", help="alike (default: %(default)s)")
    parser.add_argument("--gpu-memory", type=size, metavar="SIZE", help="of each, as 80GB (default: this machine's)")
    parser.add_argument("--host-memory", type=size, metavar="SIZE", help="of each machine (default: this one's)")
    parser.add_argument("--disk", type=size, metavar="SIZE", help="free on each machine (default: here and now)")
    parser.add_argument("--deepspeed-config", metavar="FILE", help="plan for a file of your own too")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes, instead of text")
    parser.set_defaults(run=run)


def size(text: str) -> int:
    """80GB, 80GiB, 80e9 -> bytes. Raises ArgumentTypeError, which the parser makes a SettingsError."""
    match = re.fullmatch(r"([\d.]+(?:e\d+)?) ?([kmgt]?)(i?)b?", text.strip().lower())
    try:
        number, letter, binary = match.groups() if match else ("", "", "")
        found = int(float(number) * (1024 if binary else 1000) ** " kmgt".index(letter or " "))
    except ValueError:
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 80GB, 80GiB or 80e9")
    return found


def count(text: str) -> int:
    """12.3e9 -> 12300000000. Raises ArgumentTypeError."""
    try:
        found = int(float(text))
    except (ValueError, OverflowError):
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count: write a number of 1 or more, such as 64 or 12.3e9")
    return found


def run(args: argparse.Namespace) -> int:
    """Prints a row per setup, and the settings of the first that fits."""
    from zoo.training.memory import KNOWN, Setup, plans

    if args.gpus is not None and args.gpus < 1:
        raise SettingsError(f"--gpus {args.gpus}: give 1 or more, or leave it out on a machine without")
    gpus, machine = machine_of(args)
    sizes, activations, family = network_of(args)
    wanted = Setup(
        precision=args.precision,
        batch_size=args.batch_size,
        accumulation=args.accumulate,
        world_size=gpus * args.machines,
        per_machine=gpus,
        checkpoint_activations=args.checkpoint_activations,
        ema=args.ema or args.ema_offload,
        ema_offload=args.ema_offload,
        keep=args.keep,
        zero_init=family in IN_PIECES,
    )
    configs = [*KNOWN, *([args.deepspeed_config] if args.deepspeed_config else [])]
    if wanted.ema:
        configs.remove("zero3_nvme")  # the Trainer refuses an average of weights that lie on NVMe
    found = plans(sizes, machine, wanted, activations, configs)
    if args.json:
        print(as_json({"sizes": asdict(sizes), "machine": asdict(machine), "plans": [in_json(p) for p in found]}))
        return 0
    print(f"{in_millions(sizes.parameters)} parameters, {how_much(wanted)}, on {where(machine, args.machines)}")
    if machine.gpu is None:
        print("this machine has no GPU: all of a run is in its memory; --gpu-memory plans for another")
    print(in_table(found))
    if any(plan.need.never_together for plan in found):
        print("device is the peak: without accumulation gradients come as activations go, and the larger counts")
    if best := next((plan for plan in found if plan.lacks is None), None):
        print(f"take: {settings_of(best)}")
        return 0
    again = replace(wanted, checkpoint_activations=True)
    found = [] if args.checkpoint_activations else plans(sizes, machine, again, activations, configs)
    best = next((plan for plan in found if plan.lacks is None), None)
    hint = f"take: {settings_of(best)}" if best else "take more GPUs, a smaller --batch-size, or --precision bf16"
    print(f"nothing fits as asked; {hint}")
    return 0


# --- the machine -----------------------------------------------------------------------------------------------------
def machine_of(args: argparse.Namespace) -> tuple[int, Machine]:
    """Processes on each machine, and what a machine has: as the options say, and else as this one."""
    import torch

    from zoo.training.memory import Machine

    here = torch.cuda.device_count()
    gpu = args.gpu_memory
    if gpu is None and here:
        gpu = torch.cuda.get_device_properties(0).total_memory
    if gpu is None and args.gpus is not None:
        raise SettingsError(f"--gpus {args.gpus}: this machine has no GPU to ask; say --gpu-memory too, as 80GB")
    disk = args.disk or shutil.disk_usage(Path.cwd()).free
    gpus = args.gpus or (here if args.gpu_memory is None else 0) or 1
    return gpus, Machine(gpu=gpu, host=args.host_memory or host_memory(), disk=disk)


def host_memory() -> int:
    """Bytes of memory of this machine. Raises SettingsError where the system does not say."""
    import os

    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError) as error:
        raise SettingsError("this system does not say how much memory it has: give --host-memory") from error


# --- the network -----------------------------------------------------------------------------------------------------
def network_of(args: argparse.Namespace) -> tuple[Sizes, Callable[[Setup], int], str | None]:
    """The sizes of what the options name, a setup -> bytes of a micro-batch's activations, and the family of a name."""
    from zoo.training.activations import activation_bytes, largest_layer
    from zoo.training.memory import Sizes

    if (args.name is None) == (args.parameters is None):
        raise SettingsError("say what to plan for: a NAME that `zoo list` shows, or --parameters with --layers ...")
    model, batch, family = by_sizes(args) if args.name is None else by_name(args)
    total = args.parameters or sum(p.numel() for p in model.parameters())

    @cache
    def measured(computing: str, recompute: bool) -> int:
        try:
            return activation_bytes(model, batch, computing=computing, recompute=recompute)
        except RuntimeError as error:  # a card may leave sizes, such as heads, to the config beside its weights
            raise SettingsError(
                f"the sizes known of {args.name} do not make a network ({error}): name another model of its size"
            ) from error

    trained = total if args.parameters else sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = Sizes(parameters=total, trained=trained, largest=min(total, largest_layer(model)))
    return sizes, lambda setup: measured(setup.computing, setup.checkpoint_activations), family


def by_name(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any], str]:
    """The network of a card, on meta, a batch for it, and its family. Raises UnknownModel, SettingsError."""
    import torch

    from zoo import AutoLoader
    from zoo.weights import blank

    card = card_of(args.name, args.task)
    if card.family not in BATCHES:
        raise SettingsError(f"zoo plan knows no batch of {card.family} yet: give --parameters ...")
    if card.config is not None:
        with blank(), torch.device("meta"):
            model = card.build(card.config)
    elif card.files:  # its weights say its sizes
        model = AutoLoader(card.task, card.name, device="cpu").get_model().to("meta")
    else:
        raise SettingsError(f"{card.name} has no fixed size: name another model, or give --parameters ...")
    return model, BATCHES[card.family](model, args.batch_size), card.family


def by_sizes(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Any], None]:
    """A causal transformer, on meta, with heads of 64 and as large a vocabulary as the parameters leave; no family."""
    import torch
    from torch import Tensor, nn

    from zoo.blocks.transformer import Transformer
    from zoo.weights import blank

    for name in ("layers", "width", "context"):
        if getattr(args, name) is None:
            raise SettingsError(f"--parameters needs --{name} too")
    width, context = args.width, args.context
    blocks = args.layers * (12 * width**2 + 13 * width)
    if width % 64 or blocks >= args.parameters:
        raise SettingsError(
            f"{args.layers} layers of width {width} have {in_millions(blocks)} parameters, of "
            f"{in_millions(args.parameters)} in all: give more --parameters, fewer --layers, and a --width that is a "
            "multiple of 64"
        )

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            vocabulary = max(1, (args.parameters - blocks) // (2 * width))
            self.embed, self.out = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
            self.body = Transformer(width=width, depth=args.layers, heads=width // 64, causal=True)

        def set_grad_checkpointing(self, enable: bool = True) -> None:
            self.body.checkpointing = enable

        def forward(self, tokens: Tensor) -> dict[str, Tensor]:
            logits = self.out(self.body(self.embed(tokens)))  # (B, T, V)
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())}

    with blank(), torch.device("meta"):
        return Causal(), {"tokens": torch.zeros(args.batch_size, context, dtype=torch.int64, device="meta")}, None


# --- what is said ----------------------------------------------------------------------------------------------------
def in_table(found: list[Plan]) -> str:
    """A row per plan; the columns that add up to a device's memory first."""
    header = ["setup", "weights", "gradients", "optimizer", "activations", "buffers", "device", "host", "disk", "fits"]
    rows = []
    for plan in found:
        need = plan.need
        parts = (need.parameters, need.gradients, need.optimizer, need.activations, need.buffers, need.device)
        cells = [in_bytes(part) for part in (*parts, need.host, need.disk + need.nvme)]
        rows.append([plan.config or plan.setup.engine, *cells, plan.lacks or "yes"])
    return table(header, rows, right=range(1, 9))


def in_json(plan: Plan) -> dict[str, Any]:
    need = asdict(plan.need) | {"device": plan.need.device}
    return {
        "setup": asdict(plan.setup),
        "need": need,
        "fits": plan.lacks is None,
        "lacks": plan.lacks,
        "settings": settings_of(plan),
    }


def settings_of(plan: Plan) -> str:
    """The settings that a training script takes."""
    words = [f"--env-type {plan.setup.engine}"]
    words += [f"--deepspeed-config {plan.config}"] if plan.config else []
    words += ["--checkpoint-activations"] if plan.setup.checkpoint_activations else []
    return " ".join(words)


def how_much(setup: Setup) -> str:
    return f"{setup.world_size} x {setup.batch_size} x {setup.accumulation} samples an update, {setup.precision}"


def where(machine: Machine, machines: int) -> str:
    gpus = f"GPUs of {in_bytes(machine.gpu)}, " if machine.gpu else ""
    room = f"{gpus}memory {in_bytes(machine.host)}, disk {in_bytes(machine.disk)}"
    return f"{machines} machine{'s' * (machines > 1)}: {room}"
