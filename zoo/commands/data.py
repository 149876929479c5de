"""`zoo data`: data sets made ready for training."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.commands.model_options import add_model_options, find

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.data import Dataset

EXAMPLES = """\
examples:
  zoo data encode --out codes.safetensors
  zoo data encode --model dvae-openai --pairs pairs.tsv --pictures img --out codes.safetensors
  zoo train dalle --codes codes.safetensors
  zoo data encode --model vqgan-emoji-tiny --matcher clip-emoji-tiny --out both.safetensors
  zoo train clip_gen --cache both.safetensors
  zoo data encode --model kl-vae-emoji-tiny --out moments.safetensors
  zoo train stable_diffusion --cache moments.safetensors
"""


def register(commands: argparse._SubParsersAction, **settings: object) -> None:
    """Adds the command."""
    parser = commands.add_parser("data", help="make a data set ready for training", epilog=EXAMPLES, **settings)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    action = actions.add_parser(
        "encode",
        help="turn pictures into codes, or a VAE's moments, once, so that training reads these only",
        epilog=EXAMPLES,
        **settings,
    )
    action.add_argument(
        "--data", default="emoji", help="a named data set, a folder, or records (.ffr) (default: %(default)s)"
    )
    action.add_argument("--split", default="train", help="which part of it (default: %(default)s)")
    action.add_argument("--pairs", type=Path, help="instead: tsv or csv of title and filepath")
    action.add_argument("--pictures", type=Path, help="folder that the filepaths of --pairs start from")
    action.add_argument(
        "--matcher",
        metavar="NAME",
        help="embed pictures too, by this CLIP: what CLIP-GEN learns from. With a VAE: contexts of captions, by its "
        "text tower, 2 T D bytes each, which pay where that tower takes a large part of a step",
    )
    action.add_argument(
        "--language", default="en", choices=("en", "zh"), help="of such captions (default: %(default)s)"
    )
    action.add_argument("--out", type=Path, default=Path("codes.safetensors"), help="(default: %(default)s)")
    action.add_argument("--batch-size", type=int, default=64, help="pictures at a time (default: %(default)s)")
    add_model_options(action)
    action.set_defaults(run=run, model="dvae-emoji-tiny")


def run(args: argparse.Namespace) -> int:
    """Writes the codes or moments of all pictures, and says how many."""
    from zoo import AutoLoader, weights
    from zoo.data.codes import encode_dataset, fingerprint

    loader = AutoLoader("img_tokenizing", args.model, args.model_dir, args.weights, args.device)
    dataset, model = open_data(args, loader.get_transform()), loader.get_model()
    words = {"batch_size": args.batch_size, "device": loader.device}
    about = {"tokenizer": fingerprint(model), "model": loader.card.name}
    if hasattr(model, "moments"):
        found = {"moments": encode_dataset(dataset, {"moments": model.moments}, **words)["moments"].half()}
        if args.matcher:
            more, by = contexts(args, words)
            found, about = found | more, about | by
        what = "{} x {} latents each, of {} numbers".format(*found["moments"].shape[2:], model.channels)
    else:
        encodes, about["vocab"] = {"codes": model.encode}, model.vocab
        if args.matcher:
            encodes["embeddings"], about["matcher"] = embedding(args, loader.device)
        found = encode_dataset(dataset, encodes, **words)
        what = "{} x {} codes each, of {}".format(*found["codes"].shape[1:], model.vocab)
    weights.write(found, args.out, metadata={"config": about})
    print(f"{args.out}: {len(dataset)} pictures, {what}")
    return 0


def open_data(args: argparse.Namespace, transform: Callable | None, tokenizer: Any = None) -> Dataset:
    """The pictures that the options name, with their captions where there is a tokenizer."""
    from zoo.data import CsvDataset, list_datasets, open_dataset, open_pictures
    from zoo.errors import SettingsError

    if args.pairs:
        return CsvDataset(args.pairs, args.pictures, transform, tokenizer, sep=None)
    if tokenizer is None:
        return open_pictures(args.data, args.split, transform)
    if args.data.lower() not in list_datasets():
        raise SettingsError(f"--matcher {args.matcher} reads captions: give --pairs, or a named data set")
    return open_dataset(args.data, args.split, transform, tokenizer, language=args.language)


def embedding(args: argparse.Namespace, device: torch.device) -> tuple[Callable, str]:
    """How the matcher embeds pictures, and its fingerprint."""
    from zoo.data.codes import fingerprint
    from zoo.models.clip_gen import embed_pictures

    matcher = find("txt_img_matching", "clip", args.matcher).get_model().to(device)
    return partial(embed_pictures, matcher), fingerprint(matcher)


def contexts(args: argparse.Namespace, words: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The contexts of all captions, by the matcher's text tower, in fp16, and what they are of."""
    from zoo.data.codes import encode_dataset, fingerprint
    from zoo.models.text_encoder import text_of

    loader = find("txt_img_matching", "clip", args.matcher)
    text = text_of(loader.get_model()).eval()
    by = {"text": fingerprint(text), "language": None if args.pairs else args.language}
    captions = open_data(args, None, loader.get_tokenizer())
    found = encode_dataset(captions, {"contexts": text.to(words["device"])}, part=1, **words)
    return {"contexts": found["contexts"].half()}, by
