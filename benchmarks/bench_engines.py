"""What the Trainer costs over DDP and over DeepSpeed: its loop against one written by hand, step by step in turn.

python benchmarks/bench_engines.py [--width 384 --depth 4 --batch-size 4 --tokens 64 --steps 150]

Two processes on CPUs, which the script starts itself. Both loops live in the same processes, on models of their own
with equal weights; before the trainer gets its next batch, the loop by hand makes one step, so that whatever else the
machine does meets both. They read the same batches through a DataLoader, clip, follow the same schedule, log the mean
loss of all processes every tenth step, and use the same optimizer: fused AdamW, under DeepSpeed inside ZeRO-2. Prints
the time of a step, the fastest and the median, and ratios: of the fastest, of the sums, and the median of the pairs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from copy import deepcopy

import torch
import torch.distributed as dist
from bench_trainer import Model, Tokens
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate

from zoo import Trainer
from zoo.training.launch import find_place, start, this_command
from zoo.training.optimizer import parameter_groups
from zoo.training.schedule import lr_at, warm_up_steps

PROCESSES, WARM, LOG = 2, 10, 10  # the first steps are not counted: buckets, the optimizer's state, and memory are made
ZERO2 = {"zero_optimization": {"stage": 2}}


class InTurn:
    """The trainer's collate_fn: called before each of its steps, it first makes one of the loop by hand.

    What passes until it is called again is the trainer's whole step. Each side waits for its own slowest process.
    """

    def __init__(self, hand: Iterator[None]):
        self.hand, self.left = hand, None
        self.seconds: dict[str, list[float]] = {"hand": [], "trainer": []}

    def __call__(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        dist.barrier()
        came = time.perf_counter()
        if self.left is not None:
            self.seconds["trainer"].append(came - self.left)
        next(self.hand)
        dist.barrier()
        self.left = time.perf_counter()
        if len(self.seconds["trainer"]) == len(self.seconds["hand"]):
            self.seconds["hand"].append(self.left - came)
        return default_collate(samples)


def by_ddp(model: nn.Module, data: Dataset, args: argparse.Namespace) -> Iterator[None]:
    """A step each time."""
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4, fused=True)

    def update(batch: dict[str, Tensor], lr: float) -> Tensor:
        loss = wrapped(**batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return loop(update, data, args)


def by_deepspeed(model: nn.Module, data: Dataset, args: argparse.Namespace) -> Iterator[None]:
    """A step each time."""
    import deepspeed

    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-4, fused=True)
    config = ZERO2 | {
        "train_micro_batch_size_per_gpu": args.batch_size,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 40,
    }
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]

    def update(batch: dict[str, Tensor], lr: float) -> Tensor:
        loss = engine(**batch)["loss"]
        engine.backward(loss)
        for group in optimizer.param_groups:
            group["lr"] = lr
        engine.step()
        return loss

    return loop(update, data, args)


def loop(
    update: Callable[[dict[str, Tensor], float], Tensor], data: Dataset, args: argparse.Namespace
) -> Iterator[None]:
    """The rest of a loop, which is the same for both."""
    batches = iter(DataLoader(data, args.batch_size, sampler=DistributedSampler(data), drop_last=True))
    warm_up, total = warm_up_steps(0.1, args.steps), torch.zeros(())
    for step in range(args.steps):
        loss = update(next(batches), lr_at(step, peak=1e-4, total=args.steps, warm_up=warm_up))
        total += loss.detach()
        if (step + 1) % LOG == 0:
            dist.all_reduce(total)
            total.zero_().item()
        yield


def later(
    build: Callable[..., Iterator[None]], model: nn.Module, data: Dataset, args: argparse.Namespace
) -> Iterator[None]:
    """Builds the loop when it is first asked for a step: the trainer has joined the processes by then."""
    yield from build(model.train(), data, args)


def compare(name: str, settings: dict, build: Callable[..., Iterator[None]], args: argparse.Namespace) -> None:
    """Both loops in turn; prints how long they took."""
    torch.manual_seed(0)
    model = Model(args.width, args.depth)
    data = Tokens(args.steps * args.batch_size * PROCESSES, args.tokens)
    turns = InTurn(later(build, deepcopy(model), data, args))
    trainer = Trainer(
        **settings,
        steps=args.steps,
        batch_size=args.batch_size,
        lr=1e-4,
        log_interval=LOG,
        progress=False,
        pytorch_device="cpu",
    )
    trainer.train(model, train_dataset=data, collate_fn=turns)
    if dist.get_rank() == 0:
        report(name, {side: times[WARM : args.steps - 1] for side, times in turns.seconds.items()})


def report(name: str, seconds: dict[str, list[float]]) -> None:
    for side, times in seconds.items():
        fastest, median = 1000 * min(times), 1000 * statistics.median(times)
        print(f"{name:10} {side:8} {fastest:8.2f} ms fastest {median:8.2f} ms median, of {len(times)} steps")
    trainer, hand = seconds["trainer"], seconds["hand"]
    fastest, whole = min(trainer) / min(hand), sum(trainer) / sum(hand)
    pairs = statistics.median(a / b for a, b in zip(trainer, hand, strict=True))
    print(f"{name:10} ratio    {fastest:8.4f} of the fastest, {whole:.4f} of the sums, {pairs:.4f} median of the pairs")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(width=384, depth=4, batch_size=4, tokens=64, steps=150).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    if find_place() is None:
        sys.exit(start(this_command(), num_gpus=PROCESSES))
    compare("DDP", {"env_type": "pytorchDDP"}, by_ddp, args)
    compare("ZeRO-2", {"env_type": "deepspeed", "deepspeed_config": ZERO2}, by_deepspeed, args)


if __name__ == "__main__":
    main()
