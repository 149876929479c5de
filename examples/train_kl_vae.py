"""Trains a KL-VAE, Stable Diffusion's first stage: pictures to a few numbers per patch and back, against a
discriminator.

    python examples/train_kl_vae.py                                 # from nothing, on the packaged emoji
    python examples/train_kl_vae.py --ds FOLDER --size 256 --widths 128 256 512 512 --blocks 2 \\
        --groups 32 --disc-width 64 --lpips lpips-vgg16 --kl-weight 1e-6
    python examples/train_kl_vae.py --model stable-diffusion-vae --decoder-only --ds FOLDER --size 256 --lr 1e-5 \\
        --lpips lpips-vgg16                                         # latents, and what was trained over them, stay
    torchrun --nproc-per-node 8 examples/train_kl_vae.py ...        # or zoo launch, deepspeed, --num-gpus 8

The second is the published kl-f8 (Rombach et al. 2022). --ds is a named data set, a folder of pictures or a file of
records (.ffr); captions are never read. --lpips lpips-vgg16 downloads the weights that compare pictures as people do;
their files may be given instead. At each evaluation the run folder gets samples/STEP.png, pictures above and what comes
back below. Start the same command again and it goes on. The run folder's model.safetensors is loaded by
AutoLoader("img_tokenizing", "kl-vae", weights=FOLDER), and by train_stable_diffusion.py --vae FOLDER, which measures
the scale of its latents.

Under DeepSpeed's launcher it trains by DDP: ZeRO shares out one model, and here are two.
`zoo info kl-vae-emoji-tiny` says with which options that model was trained.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from zoo.commands.autoencoders import add_adversary_options, add_picture_options, train_autoencoder
from zoo.commands.model_options import find
from zoo.models.kl_vae import KlVae, KlVaeConfig
from zoo.training.adversarial import AdversarialTrainer
from zoo.training.options import add_options

SIZES = ("size", "blocks", "latent", "groups", "kl_weight")
CHANGES_THE_DATA_OR_THE_MODEL = (*SIZES, "ds", "widths", "attention", "disc_width", "noise", "model", "decoder_only")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_kl_vae.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_picture_options(parser)
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="a card or a run folder to go on with, whose sizes hold (default: a new one)")
    model.add_argument("--decoder-only", action="store_true", help="leave the encoder, and so its latents, as they are")
    model.add_argument("--size", type=int, default=64, help="side of a picture in pixels (%(default)s)")
    model.add_argument(
        "--widths", type=int, nargs="+", default=[32, 64, 96], metavar="CHANNELS",
        help="of each level, each at half the one before: four make f8 (32 64 96)",
    )  # fmt: skip
    model.add_argument("--blocks", type=int, default=1, help="residual blocks per level (%(default)s)")
    model.add_argument("--attention", type=int, nargs="*", default=[], metavar="LEVEL", help="levels with it (none)")
    model.add_argument("--latent", type=int, default=4, help="numbers of a latent (%(default)s)")
    model.add_argument("--groups", type=int, default=4, help="of channels in norms; published 32 (%(default)s)")
    model.add_argument("--kl-weight", type=float, default=1e-6, help="of the KL term (%(default)s)")
    add_adversary_options(parser)
    add_options(
        parser, batch_size=32, lr=1e-3, weight_decay=0.0, warm_up=0.02, ema=0.999, run_folder=Path("runs/kl_vae")
    )  # fmt: skip
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> KlVae:
    """The model to train."""
    sizes = {name: getattr(args, name) for name in SIZES}
    if not args.model:
        # A scale of 1 stands for one that train_stable_diffusion.py measures.
        return KlVae(KlVaeConfig(widths=tuple(args.widths), attention=tuple(args.attention), scale=1.0, **sizes))
    model = find("img_tokenizing", "kl-vae", args.model).get_model()
    model.config = replace(model.config, size=args.size, kl_weight=args.kl_weight)
    for part in (model.encoder, model.quant_conv) if args.decoder_only else ():
        part.requires_grad_(False)
    return model


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.manual_seed(args.seed)
    model = build(args)
    train_autoencoder(args, model, AdversarialTrainer, "kl_vae", CHANGES_THE_DATA_OR_THE_MODEL)


if __name__ == "__main__":
    main()
