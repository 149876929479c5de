"""How long a checkpoint stops the loop: written beside the training against written by the loop itself, in turn.

python benchmarks/bench_checkpoint.py [--width 1024 --depth 10 --tokens 8 --every 8 --saves 3 --rounds 2]

A transformer of 127 M parameters in fp32, 0.5 GB, trained by AdamW in one process; with the optimizer's two moments a
checkpoint is 1.5 GB. Prints the seconds that a save stops the loop: the first of a run, for which memory is taken, and
the median of the others; the seconds until a checkpoint has its name; and those of a step, while one is being written
and else. What is not yet written when the next save is due is waited for, which is not counted.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from bench_trainer import Model, Tokens
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

import zoo.training.trainer
from zoo import Trainer
from zoo.training.run import Run

SIDES = {"loop": False, "beside": True}


class Watch:
    """What is measured of one run: seconds by what took them. Also the run's collate_fn, called before each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.begun: float | None = None  # when the checkpoint that is being written was
        self.was: tuple[float, bool] | None = None  # when the last step began, and whether one was being written

    def __call__(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        now, writing = time.perf_counter(), self.begun is not None
        if self.was is not None and self.was[1] == writing:  # else it is a part of both
            self.seconds["step while writing" if writing else "step"].append(now - self.was[0])
        self.was = (now, writing)
        return default_collate(samples)

    def run(self, **words: object) -> Run:
        """A run whose saves are timed, but for the last, after which there is nothing to stop."""
        watch = self

        class Watched(Run):
            def __post_init__(self) -> None:
                super().__post_init__()
                self.saver.after, self.prune = self.written, self.saver.after

            def save(self) -> None:
                self.saver.wait()
                watch.begun = start = time.perf_counter()
                super().save()
                watch.was = None
                if self.step < self.total:
                    watch.seconds["stop"].append(time.perf_counter() - start)

            def written(self) -> None:
                self.prune()
                watch.seconds["written"].append(time.perf_counter() - watch.begun)
                watch.begun = None

        return Watched(**words)


def train(model: nn.Module, data: Dataset, args: argparse.Namespace, folder: Path, beside: bool) -> Watch:
    """Trains with a checkpoint every so many steps; the last one ends the run."""
    watch = Watch()
    zoo.training.trainer.Run = watch.run
    trainer = Trainer(
        steps=(args.saves + 1) * args.every,
        lr=1e-5,
        save_interval=args.every,
        keep=1,
        async_save=beside,
        run_folder=folder,
        progress=False,
        pytorch_device="cpu",
    )
    trainer.train(model, train_dataset=data, collate_fn=watch)
    shutil.rmtree(folder)
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(width=1024, depth=10, tokens=8, every=8, saves=3, rounds=2).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--folder", help="where to write, if not in the folder for temporary files")
    args = parser.parse_args()
    torch.manual_seed(0)
    model, data = Model(args.width, args.depth), Tokens(64, args.tokens)
    found: dict[str, dict[str, list[float]]] = {side: defaultdict(list) for side in SIDES}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for turn in range(args.rounds):
            for side in sorted(SIDES, reverse=turn % 2 == 1):  # who goes first changes
                seconds = train(model, data, args, Path(folder) / side, SIDES[side]).seconds
                first, *later = seconds.pop("stop")
                for name, times in {"first stop": [first], "later stop": later, **seconds}.items():
                    found[side][name] += times
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.0f} M parameters, {4 * size / 1e9:.2f} GB; {12 * size / 1e9:.2f} GB are written")
    for side, rows in found.items():
        for name, times in rows.items():
            middle = statistics.median(times)
            print(f"{side:7} {name:20} {min(times):7.3f} s fastest {middle:7.3f} s median of {len(times)}")
    for name in ("first stop", "later stop"):
        ratio = statistics.median(found["beside"][name]) / statistics.median(found["loop"][name])
        print(f"ratio   {name:20} {ratio:7.3f}")


if __name__ == "__main__":
    main()
