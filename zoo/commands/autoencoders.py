"""What the scripts that train a picture's autoencoder against a discriminator have alike: options, data, samples."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from torch.utils.data import Dataset

    from zoo.training.adversarial import AdversarialTrainer

HELD_OUT, SHOWN = 400, 16  # pictures that each evaluation looks at; and draws
SMALLEST = 24  # pixels, of which the discriminator has one logit


def add_picture_options(parser: argparse.ArgumentParser) -> None:
    """--ds, --noise."""
    parser.add_argument("--ds", default="emoji", help="a named data set, a folder, or records (%(default)s)")
    parser.add_argument(
        "--noise", type=float, default=4, help="on pictures in training, in levels of 255 (%(default)s)"
    )


def add_adversary_options(parser: argparse.ArgumentParser) -> None:
    """The group of what the autoencoder is trained against."""
    judge = parser.add_argument_group("against what")
    judge.add_argument("--lpips", nargs="+", metavar="FILE", help="lpips-vgg16, or files of its weights")
    judge.add_argument("--perceptual", type=float, default=1.0, help="weight of LPIPS (%(default)s)")
    judge.add_argument(
        "--perceptual-share", type=float, default=1.0, help="of a batch that LPIPS looks at (%(default)s)"
    )
    judge.add_argument("--adversarial", type=float, default=0.8, help="weight of the discriminator (%(default)s)")
    judge.add_argument("--cap", type=float, default=1e4, help="largest adaptive weight (%(default)s)")
    judge.add_argument("--disc-start", type=float, default=0.25, help="it learns from; <1 a part of all (%(default)s)")
    judge.add_argument("--disc-warm-up", type=float, default=0.05, help="and counts after (%(default)s)")
    judge.add_argument("--disc-rest", type=float, default=0.05, help="below this loss it rests (%(default)s)")
    judge.add_argument("--disc-width", type=int, default=32, help="its first channels; published 64 (%(default)s)")


def open_pictures_to_draw(args: argparse.Namespace) -> tuple[Dataset, Dataset | None]:
    """Training pictures, and held-out ones to measure on (None where the data set has none). Raises SettingsError for
    pictures too small to judge."""
    from torch.utils.data import Subset

    from zoo.data import Dequantize, dvae_train_transform, list_datasets, open_pictures, unit_transform
    from zoo.errors import SettingsError

    if args.size < SMALLEST:
        raise SettingsError(f"--size {args.size}: the discriminator looks at patches, give {SMALLEST} pixels or more")
    train = open_pictures(args.ds, "train", Dequantize(transform=dvae_train_transform(args.size), levels=args.noise))
    if args.ds.lower() not in list_datasets():
        return train, None
    held_out = open_pictures(args.ds, "test", unit_transform(args.size))
    return train, Subset(held_out, range(0, len(held_out), math.ceil(len(held_out) / HELD_OUT)))


def draw_reconstructions(model: nn.Module, dataset: Dataset, path: Path) -> None:
    """Writes some pictures, and below them what comes back."""
    import torch

    from zoo import distributed
    from zoo.generation.text_to_image import to_pil
    from zoo.pictures import grid

    device = next(model.parameters()).device
    images = torch.stack([dataset[i][0] for i in range(0, len(dataset), math.ceil(len(dataset) / SHOWN))])
    images = images[: len(images) // 8 * 8 or None]  # whole rows, so that each picture stands above its own
    with torch.no_grad():
        again = model.reconstruct(images.to(device))
    if distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            half
            for images, again in zip(images.split(8), again.split(8), strict=True)
            for half in to_pil(images) + to_pil(again)
        ]
        grid(rows, min(8, len(images)), cell=96).save(path)


def train_autoencoder(
    args: argparse.Namespace,
    model: nn.Module,
    kind: type[AdversarialTrainer],
    name: str,
    changes: Sequence[str],
    vocab: int | None = None,
) -> None:
    """Trains it by these options, and measures it at each evaluation. `changes`: the options that a run is not gone on
    with others of. `vocab`: of its codes; None for latents."""
    from zoo.commands.evaluate_dvae import load_lpips
    from zoo.data import collate_fn
    from zoo.metrics.reconstruction import reconstruction
    from zoo.models.patch_discriminator import PatchDiscriminator
    from zoo.training.adversarial import Adversary
    from zoo.training.options import trainer_words

    train, held_out = open_pictures_to_draw(args)
    words = trainer_words(args)
    if not args.steps and not args.epochs:
        words["epochs"] = 10
    trainer = kind(
        discriminator=PatchDiscriminator(args.disc_width),
        perceptual=load_lpips(args.lpips) if args.lpips else None,
        adversary=Adversary(
            perceptual=args.perceptual,
            perceptual_share=args.perceptual_share,
            adversarial=args.adversarial,
            cap=args.cap,
            start=args.disc_start,
            warm_up=args.disc_warm_up,
            rest=args.disc_rest,
        ),
        experiment_name=name,
        betas=(0.5, 0.9),
        about={option: str(getattr(args, option)) for option in changes},
        best="psnr" if held_out else "loss",
        maximise=bool(held_out),
        **words,
    )

    def evaluate(shown: nn.Module) -> dict[str, float]:
        draw_reconstructions(shown, held_out or train, args.run_folder / f"samples/{trainer.step:06}.png")
        if held_out is None:
            return {}
        device = next(shown.parameters()).device
        return reconstruction(shown.encode, shown.decode, vocab, held_out, distance=trainer.perceptual, device=device)

    trainer.train(model, train_dataset=train, collate_fn=collate_fn, evaluate=evaluate)
