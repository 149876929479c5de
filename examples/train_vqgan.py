"""Trains a VQGAN, CLIP-GEN's first stage: pictures to grids of codes and back, against a discriminator.

    python examples/train_vqgan.py                                  # from nothing, on the packaged emoji
    python examples/train_vqgan.py --ds FOLDER --size 256 --widths 128 128 256 256 512 --blocks 2 --attention 4 \\
        --groups 32 --vocab 16384 --code-width 256 --latent 256 --disc-width 64 --lpips lpips-vgg16
    torchrun --nproc-per-node 8 examples/train_vqgan.py ...         # or zoo launch, deepspeed, --num-gpus 8

The second is the published f16 (Esser et al. 2021). --ds is a named data set, a folder of pictures or a file of
records (.ffr); captions are never read. --lpips lpips-vgg16 downloads the weights that compare pictures as people do;
their files may be given instead. Without it they are compared by their pixels alone, and blur. At each evaluation the
run folder gets samples/STEP.png, pictures above and what comes back below. Start the same command again and it goes
on. The run folder's model.safetensors is loaded by AutoLoader("img_tokenizing", "vqgan", weights=FOLDER).

Under DeepSpeed's launcher it trains by DDP: ZeRO shares out one model, and here are two.
`zoo info vqgan-emoji-tiny` says with which options that model was trained.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from zoo import distributed
from zoo.commands.evaluate_dvae import load_lpips
from zoo.data import Dequantize, collate_fn, dvae_train_transform, list_datasets, open_pictures, unit_transform
from zoo.errors import SettingsError
from zoo.generation.text_to_image import to_pil
from zoo.metrics.reconstruction import reconstruction
from zoo.models.patch_discriminator import PatchDiscriminator
from zoo.models.vqgan import Vqgan, VqganConfig
from zoo.pictures import grid
from zoo.training.adversarial import AdversarialTrainer, Adversary
from zoo.training.options import add_options, trainer_words
from zoo.training.schedule import cosine

HELD_OUT, SHOWN = 400, 16  # pictures that each evaluation looks at; and draws
GUMBEL_COLDEST = 1 / 16
SMALLEST = 24  # pixels, of which the discriminator has one logit
CHANGES_THE_DATA_OR_THE_MODEL = (
    *("ds", "size", "widths", "blocks", "attention", "latent", "groups", "vocab", "code_width", "quantizer"),
    *("codebook", "commitment", "decay", "restart", "disc_width", "noise"),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_vqgan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ds", default="emoji", help="a named data set, a folder, or records (%(default)s)")
    parser.add_argument(
        "--noise", type=float, default=4, help="on pictures in training, in levels of 255 (%(default)s)"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--size", type=int, default=64, help="side of a picture in pixels (%(default)s)")
    model.add_argument(
        "--widths", type=int, nargs="+", default=[32, 32, 64, 96], metavar="CHANNELS",
        help="of each level, each at half the one before: five make f16 (32 32 64 96)",
    )  # fmt: skip
    model.add_argument("--blocks", type=int, default=1, help="residual blocks per level (%(default)s)")
    model.add_argument("--attention", type=int, nargs="*", default=[3], metavar="LEVEL", help="levels with it (3)")
    model.add_argument("--latent", type=int, default=64, help="channels between the halves (%(default)s)")
    model.add_argument("--groups", type=int, default=4, help="of channels in norms; published 32 (%(default)s)")
    model.add_argument("--vocab", type=int, default=1024, help="codes that there are (%(default)s)")
    model.add_argument("--code-width", type=int, default=32, help="numbers of a code (%(default)s)")
    model.add_argument("--quantizer", default="vq", choices=("vq", "cosine", "gumbel"), help="(%(default)s)")
    model.add_argument("--codebook", type=float, default=1.0, help="weight of codes to latents (%(default)s)")
    model.add_argument("--commitment", type=float, default=0.25, help="weight of latents to codes (%(default)s)")
    model.add_argument(
        "--decay", type=float, default=0.0, help="codes follow an average instead, as 0.99 (%(default)s)"
    )
    model.add_argument(
        "--restart", type=float, default=0.0, help="codes used less often per step begin anew (%(default)s)"
    )
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
    add_options(
        parser, batch_size=32, lr=1e-3, weight_decay=0.0, warm_up=0.02, ema=0.999, run_folder=Path("runs/vqgan")
    )  # fmt: skip
    return parser.parse_args(argv)


class VqganTrainer(AdversarialTrainer):
    """The temperature of a Gumbel quantizer falls along a cosine; it follows from the step, so a resumed run has it."""

    def forward_step(self, data: Any, model: nn.Module, mems: Any = None) -> Mapping[str, Any]:
        return model(image=data["image"], temperature=cosine(self.step, 1.0, GUMBEL_COLDEST, self.total // 2))


def open_data(args: argparse.Namespace) -> tuple[Dataset, Dataset | None]:
    """Training pictures, and held-out ones to measure on (None where the data set has none)."""
    train = open_pictures(args.ds, "train", Dequantize(transform=dvae_train_transform(args.size), levels=args.noise))
    if args.ds.lower() not in list_datasets():
        return train, None
    held_out = open_pictures(args.ds, "test", unit_transform(args.size))
    return train, Subset(held_out, range(0, len(held_out), math.ceil(len(held_out) / HELD_OUT)))


@torch.no_grad()
def draw_samples(model: Vqgan, dataset: Dataset, path: Path) -> None:
    """Writes some pictures, and below them what comes back."""
    device = next(model.parameters()).device
    images = torch.stack([dataset[i][0] for i in range(0, len(dataset), math.ceil(len(dataset) / SHOWN))])
    images = images[: len(images) // 8 * 8 or None]  # whole rows, so that each picture stands above its own
    again = model.reconstruct(images.to(device))
    if distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            half
            for images, again in zip(images.split(8), again.split(8), strict=True)
            for half in to_pil(images) + to_pil(again)
        ]
        grid(rows, min(8, len(images)), cell=96).save(path)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.size < SMALLEST:
        raise SettingsError(f"--size {args.size}: the discriminator looks at patches, give {SMALLEST} pixels or more")
    words = trainer_words(args)
    if not args.steps and not args.epochs:
        words["epochs"] = 10
    train, held_out = open_data(args)
    sizes = {
        name: getattr(args, name) for name in ("size", "blocks", "latent", "groups", "vocab", "code_width", "quantizer")
    }
    learning = {name: getattr(args, name) for name in ("codebook", "commitment", "decay", "restart")}
    torch.manual_seed(args.seed)
    model = Vqgan(VqganConfig(widths=tuple(args.widths), attention=tuple(args.attention), **sizes, **learning))
    trainer = VqganTrainer(
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
        experiment_name="vqgan",
        betas=(0.5, 0.9),
        about={name: str(getattr(args, name)) for name in CHANGES_THE_DATA_OR_THE_MODEL},
        best="psnr" if held_out else "loss",
        maximise=bool(held_out),
        **words,
    )

    def evaluate(shown: Vqgan) -> dict[str, float]:
        draw_samples(shown, held_out or train, args.run_folder / f"samples/{trainer.step:06}.png")
        if held_out is None:
            return {}
        device = next(shown.parameters()).device
        return reconstruction(
            shown.encode, shown.decode, shown.vocab, held_out, distance=trainer.perceptual, device=device
        )

    trainer.train(model, train_dataset=train, collate_fn=collate_fn, evaluate=evaluate)


if __name__ == "__main__":
    main()
