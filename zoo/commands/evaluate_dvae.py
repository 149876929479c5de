"""`zoo eval dvae`: what is left of pictures after an image tokenizer, and how it uses its codes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.commands.model_options import add_model_options
from zoo.commands.tables import as_json

if TYPE_CHECKING:
    from zoo.metrics.lpips import Lpips

DEFAULT = "dvae-emoji-tiny"
EXAMPLES = """\
examples:
  zoo eval dvae --lpips lpips-vgg16
  zoo eval dvae --model dvae-openai --data emoji --split test
  zoo eval dvae --model kl-vae-emoji-tiny --lpips lpips-vgg16
"""


def register(families: argparse._SubParsersAction, shared: Any, **settings: object) -> None:
    """Adds the family. `shared(parser)` adds the options that all families have."""
    parser = families.add_parser(
        "dvae", help="pictures through a dVAE, VQGAN or KL-VAE, and back", epilog=EXAMPLES, **settings
    )
    parser.add_argument(
        "--lpips",
        metavar="FILE",
        nargs="+",
        help="measure LPIPS too: lpips-vgg16, which is downloaded, or files of its weights (without: says which)",
    )
    shared(parser)
    add_model_options(parser)
    parser.set_defaults(run=run, model=DEFAULT, batch_size=64)


def run(args: argparse.Namespace) -> int:
    """Prints how near pictures come back, and how many codes are used how evenly."""
    from zoo import AutoLoader
    from zoo.data import open_dataset
    from zoo.metrics.lpips import HOW_TO_GET
    from zoo.metrics.reconstruction import reconstruction

    open_dataset(args.data, args.split)  # a wrong name is said before weights are read
    loader = AutoLoader("img_tokenizing", args.model, args.model_dir, args.weights, args.device)
    dataset = open_dataset(args.data, args.split, loader.get_transform(), language=None)
    distance = load_lpips(args.lpips, args.model_dir).to(loader.device) if args.lpips else None
    model = loader.get_model()
    vocab = getattr(model, "vocab", None)  # a KL-VAE has latents instead of codes
    found = reconstruction(
        model.encode, model.decode, vocab, dataset,
        distance=distance, batch_size=args.batch_size, device=loader.device,
    )  # fmt: skip
    if args.json:
        about = {"model": args.model, "data": args.data, "split": args.split}
        print(as_json(about | found))
        return 0
    side, grid = model.image_size, model.grid
    print(
        f"{args.model} on {args.data}, {args.split}: {found['pictures']} pictures of {side} x {side} pixels, ", end=""
    )
    print(f"{grid} x {grid} {'codes' if vocab else f'latents of {model.channels} numbers'} each")
    print(f"  PSNR        {found['psnr']:.2f} dB")
    print(f"  LPIPS       {found['lpips']:.4f}" if distance else "  LPIPS       not measured: give --lpips FILE")
    if vocab:
        print(f"  codes used  {round(found['code_usage'] * vocab)} of {vocab}")
        print(f"  perplexity  {found['code_perplexity']:.1f} codes")
    if not distance:
        print(f"\n{HOW_TO_GET}.")
    return 0


def load_lpips(paths: list[str], model_dir: str | None = None) -> Lpips:
    """The distance whose weights are in these files, or that of a card's name. On the CPU.

    Raises UnreadableWeights, WeightsMismatch with a remedy, and for a card DownloadError.
    """
    from zoo import AutoLoader, list_models, weights
    from zoo.errors import UnreadableWeights, nearest
    from zoo.metrics.lpips import Lpips

    names = list_models("img_comparing")
    gone = [path for path in paths if not Path(path).exists()]
    if gone == paths and len(paths) == 1 and paths[0].lower() in names:
        return AutoLoader("img_comparing", paths[0], model_dir, device="cpu").get_model()
    if gone:
        raise UnreadableWeights(f"there is no file or folder {gone[0]}, and no such name; {nearest(gone[0], names)}")
    return Lpips.from_state({name: tensor for path in paths for name, tensor in weights.read(path).items()})
