"""`zoo train`: the training scripts of examples/, by name."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module

from zoo.errors import MissingPackage, SettingsError, nearest

SCRIPTS: dict[str, Callable] = {
    "clip": lambda: import_module("zoo.examples.train_clip"),
    "dvae": lambda: import_module("zoo.examples.train_dvae"),
    "dalle": lambda: import_module("zoo.examples.train_dalle"),
    "vqgan": lambda: import_module("zoo.examples.train_vqgan"),
    "clip_gen": lambda: import_module("zoo.examples.train_clip_gen"),
    "kl_vae": lambda: import_module("zoo.examples.train_kl_vae"),
    "stable_diffusion": lambda: import_module("zoo.examples.train_stable_diffusion"),
}
EXAMPLES = """\
examples:
  zoo train clip                          on the packaged data, on this machine
  zoo train clip --help                   all settings of the script
  zoo train dvae                          pictures to grids of codes and back: DALL-E's first stage
  zoo train dalle                         captions to codes: the second
  zoo train vqgan                         pictures to codes and back, against a discriminator: CLIP-GEN's first stage
  zoo train clip_gen                      CLIP embeddings to codes: the second, without captions
  zoo train kl_vae                        pictures to latents and back: Stable Diffusion's first stage
  zoo train stable_diffusion              captions to latents: the second
  zoo train clip --steps 200 --batch-size 64 --run-folder runs/first
"""


def register(commands: argparse._SubParsersAction, **settings: object) -> None:
    """Adds the command."""
    parser = commands.add_parser("train", help="train a model", epilog=EXAMPLES, **settings)
    parser.add_argument("family", metavar="FAMILY", help=f"what to train: {', '.join(SCRIPTS)}")
    rest = parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="...", help="settings of the script")
    rest.required = False  # or it would be named as missing where FAMILY is
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the script with all that follows its name."""
    if args.family not in SCRIPTS:
        raise SettingsError(f"no training script {args.family!r}; {nearest(args.family, SCRIPTS)}")
    try:
        script = SCRIPTS[args.family]()
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("zoo.examples"):
            raise
        raise MissingPackage("the training scripts are not installed; reinstall zoo with `pip install .`") from error
    return script.main(args.rest) or 0
