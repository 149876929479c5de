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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zoo.commands.autoencoders import add_adversary_options, add_picture_options, train_autoencoder
from zoo.models.vqgan import Vqgan, VqganConfig
from zoo.training.adversarial import AdversarialTrainer
from zoo.training.options import add_options
from zoo.training.schedule import cosine

GUMBEL_COLDEST = 1 / 16
CHANGES_THE_DATA_OR_THE_MODEL = (
    *("ds", "size", "widths", "blocks", "attention", "latent", "groups", "vocab", "code_width", "quantizer"),
    *("codebook", "commitment", "decay", "restart", "disc_width", "noise"),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_vqgan.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_picture_options(parser)
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
    add_adversary_options(parser)
    add_options(
        parser, batch_size=32, lr=1e-3, weight_decay=0.0, warm_up=0.02, ema=0.999, run_folder=Path("runs/vqgan")
    )  # fmt: skip
    return parser.parse_args(argv)


class VqganTrainer(AdversarialTrainer):
    """The temperature of a Gumbel quantizer falls along a cosine; it follows from the step, so a resumed run has it."""

    def forward_step(self, data: Any, model: nn.Module, mems: Any = None) -> Mapping[str, Any]:
        return model(image=data["image"], temperature=cosine(self.step, 1.0, GUMBEL_COLDEST, self.total // 2))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    sizes = {
        name: getattr(args, name) for name in ("size", "blocks", "latent", "groups", "vocab", "code_width", "quantizer")
    }
    learning = {name: getattr(args, name) for name in ("codebook", "commitment", "decay", "restart")}
    torch.manual_seed(args.seed)
    model = Vqgan(VqganConfig(widths=tuple(args.widths), attention=tuple(args.attention), **sizes, **learning))
    train_autoencoder(args, model, VqganTrainer, "vqgan", CHANGES_THE_DATA_OR_THE_MODEL, args.vocab)


if __name__ == "__main__":
    main()
