"""`zoo data`: data sets made ready for training."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from zoo.commands.model_options import add_model_options, find

EXAMPLES = """\
examples:
  zoo data encode --out codes.safetensors
  zoo data encode --model dvae-openai --pairs pairs.tsv --pictures img --out codes.safetensors
  zoo train dalle --codes codes.safetensors
  zoo data encode --model vqgan-emoji-tiny --matcher clip-emoji-tiny --out both.safetensors
  zoo train clip_gen --cache both.safetensors
"""


def register(commands: argparse._SubParsersAction, **settings: object) -> None:
    """Adds the command."""
    parser = commands.add_parser("data", help="make a data set ready for training", epilog=EXAMPLES, **settings)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    action = actions.add_parser(
        "encode", help="turn pictures into codes once, so that training reads codes only", epilog=EXAMPLES, **settings
    )
    action.add_argument(
        "--data", default="emoji", help="a named data set, a folder, or records (.ffr) (default: %(default)s)"
    )
    action.add_argument("--split", default="train", help="which part of it (default: %(default)s)")
    action.add_argument("--pairs", type=Path, help="instead: tsv or csv of title and filepath")
    action.add_argument("--pictures", type=Path, help="folder that the filepaths of --pairs start from")
    action.add_argument("--matcher", metavar="NAME", help="embed pictures too, by this CLIP: what CLIP-GEN learns from")
    action.add_argument("--out", type=Path, default=Path("codes.safetensors"), help="(default: %(default)s)")
    action.add_argument("--batch-size", type=int, default=64, help="pictures at a time (default: %(default)s)")
    add_model_options(action)
    action.set_defaults(run=run, model="dvae-emoji-tiny")


def run(args: argparse.Namespace) -> int:
    """Writes the codes of all pictures, and says how many."""
    from zoo import AutoLoader, weights
    from zoo.data import CsvDataset, open_pictures
    from zoo.data.codes import encode_dataset, fingerprint
    from zoo.models.clip_gen import embed_pictures

    loader = AutoLoader("img_tokenizing", args.model, args.model_dir, args.weights, args.device)
    transform = loader.get_transform()
    if args.pairs:
        dataset = CsvDataset(args.pairs, args.pictures, transform, None, sep=None)
    else:
        dataset = open_pictures(args.data, args.split, transform)
    model = loader.get_model()
    encodes = {"codes": model.encode}
    about = {"tokenizer": fingerprint(model), "model": loader.card.name, "vocab": model.vocab}
    if args.matcher:
        matcher = find("txt_img_matching", "clip", args.matcher).get_model().to(loader.device)
        encodes["embeddings"] = partial(embed_pictures, matcher)
        about["matcher"] = fingerprint(matcher)
    found = encode_dataset(dataset, encodes, batch_size=args.batch_size, device=loader.device)
    weights.write(found, args.out, metadata={"config": about})
    codes = found["codes"]
    print(f"{args.out}: {len(codes)} pictures, {codes.shape[1]} x {codes.shape[2]} codes each, of {model.vocab}")
    return 0
