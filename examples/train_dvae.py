"""Trains a discrete VAE, DALL-E's first stage: pictures to grids of codes and back.

    python examples/train_dvae.py                                       # from nothing, on the packaged emoji
    python examples/train_dvae.py --pictures FOLDER --size 256 --vocab 8192 --hidden 256 --blocks 2 --stem 128
    deepspeed --hostfile hostfile examples/train_dvae.py                # or zoo launch, torchrun, --num-gpus 2

The second is the published size. Loss, annealing and average are the paper's (Ramesh et al. 2021, appendix A): the
temperature falls along a cosine, the weight of the divergence rises along one, the rate falls along one, and it is the
moving average of the weights that is judged and kept. Start the same command again and it goes on. The run folder's
model.safetensors is loaded by AutoLoader("img_tokenizing", "dvae", weights=FOLDER).

`zoo info dvae-emoji-tiny` says with which options that model was trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from zoo import Trainer
from zoo.data import Dequantize, FolderDataset, collate_fn, dvae_train_transform, open_dataset, unit_transform
from zoo.metrics.reconstruction import reconstruction
from zoo.models.dvae import Dvae, DvaeConfig
from zoo.training.options import add_options, trainer_words
from zoo.training.schedule import cosine

CHANGES_THE_DATA_OR_THE_MODEL = (
    *("pictures", "size", "vocab", "hidden", "stem", "blocks"),
    *("straight_through", "kl_weight", "kl_steps", "temperature_steps", "evenness", "noise"),
)

HELD_OUT = 400  # pictures that each evaluation looks at; `zoo eval dvae` takes all


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_dvae.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pictures", type=Path, help="folder of pictures; default: the packaged emoji")
    parser.add_argument("--size", type=int, default=64, help="side of a picture in pixels (%(default)s)")
    parser.add_argument("--vocab", type=int, default=1024, help="codes that there are (%(default)s)")
    parser.add_argument("--hidden", type=int, default=48, help="channels at full resolution (%(default)s)")
    parser.add_argument("--stem", type=int, default=64, help="width of the decoder's code book (%(default)s)")
    parser.add_argument("--blocks", type=int, default=1, help="residual blocks per resolution (%(default)s)")
    parser.add_argument("--straight-through", action="store_true", help="the decoder sees hard codes in training")
    parser.add_argument("--kl-weight", type=float, default=6.6, help="of the divergence, in the end (%(default)s)")
    parser.add_argument("--kl-steps", type=float, default=0.01, help="until then; below 1 a part of all (%(default)s)")
    parser.add_argument(
        "--temperature-steps", type=float, default=0.5, help="until it is 1/16; below 1 a part of all (%(default)s)"
    )
    parser.add_argument("--evenness", type=float, default=0.0, help="weight of using all codes alike (%(default)s)")
    parser.add_argument("--noise", type=float, default=16, help="on emoji in training, in levels of 255 (%(default)s)")
    add_options(
        parser,
        batch_size=32,
        lr=1e-3,
        lr_floor=0.0125,
        weight_decay=1e-4,
        warm_up=0.02,
        ema=0.999,
        run_folder=Path("runs/dvae"),
    )
    return parser.parse_args(argv)


def steps_of(given: float, total: int) -> int:
    """Below 1 a part of all steps, from 1 on steps."""
    return round(given * total) if given < 1 else round(given)


class DvaeTrainer(Trainer):
    """The two annealed numbers of the loss follow from the step, so a resumed run has the same."""

    def __init__(
        self, *, kl_weight: float, kl_steps: float, temperature_steps: float, evenness: float, **settings: Any
    ):
        super().__init__(**settings)
        self.kl_weight, self.kl_steps, self.temperature_steps = kl_weight, kl_steps, temperature_steps
        self.evenness = evenness

    def forward_step(self, data: Any, model: nn.Module, mems: Any = None) -> Mapping[str, Any]:
        return model(
            image=data["image"],
            temperature=cosine(self.step, 1.0, 1 / 16, steps_of(self.temperature_steps, self.total)),
            kl_weight=cosine(self.step, 0.0, self.kl_weight, steps_of(self.kl_steps, self.total)),
            evenness=self.evenness,
        )


def open_data(args: argparse.Namespace) -> tuple[Dataset, Dataset | None]:
    """Training pictures, and held-out ones to measure on (None for pictures of one's own)."""
    crop = dvae_train_transform(args.size)
    if args.pictures:
        return FolderDataset(args.pictures, crop, captions=False), None
    plain = unit_transform(args.size)
    held_out = open_dataset("emoji", "test", plain, language=None)
    few = range(0, len(held_out), len(held_out) // HELD_OUT)
    return open_dataset("emoji", "train", Dequantize(transform=crop, levels=args.noise), language=None), Subset(
        held_out, few
    )


@torch.no_grad()
def measure(dataset: Dataset, model: Dvae) -> dict[str, float]:
    """Held-out pictures: the loss and its parts at the last temperature, how near the pictures come back, in decibels,
    and how many of the codes are used and how evenly."""
    device = next(model.parameters()).device
    sums: dict[str, float] = {}
    for batch in DataLoader(dataset, batch_size=64, collate_fn=collate_fn):
        for name, value in model(image=batch["image"].to(device)).items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(batch["image"])
    found = reconstruction(model.encode, model.decode, model.vocab, dataset, device=device)
    return {name: value / len(dataset) for name, value in sums.items()} | found


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.manual_seed(args.seed)
    model = Dvae(DvaeConfig(size=args.size, vocab=args.vocab, hidden=args.hidden, stem=args.stem, blocks=args.blocks))
    model.straight_through = args.straight_through
    train, held_out = open_data(args)
    words = trainer_words(args)
    if not args.steps and not args.epochs:
        words["epochs"] = 10
    trainer = DvaeTrainer(
        kl_weight=args.kl_weight,
        kl_steps=args.kl_steps,
        temperature_steps=args.temperature_steps,
        evenness=args.evenness,
        experiment_name="dvae",
        lr_floor=args.lr_floor,
        about={name: str(getattr(args, name)) for name in CHANGES_THE_DATA_OR_THE_MODEL},
        best="loss",
        **words,
    )
    evaluate = partial(measure, held_out) if held_out else None
    trainer.train(model, train_dataset=train, collate_fn=collate_fn, evaluate=evaluate)


if __name__ == "__main__":
    main()
