"""`zoo eval`: figures of a model on a named data set."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from zoo.commands.model_options import Matcher, add_model_options, load_matcher
from zoo.commands.tables import as_json, table

if TYPE_CHECKING:
    from zoo.metrics.retrieval import Ranks

FAMILIES = ("clip",)
EXAMPLES = """\
examples:
  zoo eval clip
  zoo eval clip --model clip-emoji-tiny --data emoji --split test --language zh
"""


def register(commands: argparse._SubParsersAction, **settings: object) -> None:
    """Adds the command."""
    parser = commands.add_parser("eval", help="measure a model on a data set", epilog=EXAMPLES, **settings)
    parser.add_argument(
        "family", choices=FAMILIES, help="what is measured: clip, the retrieval of captions and pictures"
    )
    parser.add_argument("--data", default="emoji", help="a named data set (default: %(default)s)")
    parser.add_argument("--split", default="test", help="which part of it (default: %(default)s)")
    parser.add_argument("--language", choices=("en", "zh"), default="en", help="of the captions (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, help="samples at a time (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints how often a picture finds its caption, and a caption its picture."""
    from dataclasses import asdict

    from zoo.data import open_dataset
    from zoo.errors import SettingsError

    if args.batch_size < 1:
        raise SettingsError(f"--batch-size {args.batch_size}: give 1 or more")
    open_dataset(args.data, args.split)  # a wrong name is said before a model is loaded
    matcher = load_matcher(args)
    found = retrieval(matcher, args.data, args.split, args.language, args.batch_size)
    if args.json:
        about = {"model": args.model, "data": args.data, "split": args.split, "language": args.language}
        print(as_json(about | {way: asdict(ranks) for way, ranks in found.items()}))
        return 0
    ranks = found["picture_to_text"]
    print(f"{args.model} on {args.data}, {args.split}, captions in {args.language}: ", end="")
    print(f"{ranks.queries} pictures, {ranks.candidates} captions")
    print(figures(found))
    return 0


def retrieval(matcher: Matcher, data: str, split: str, language: str = "en", batch_size: int = 256) -> dict[str, Ranks]:
    """Retrieval in both directions over a split. Pictures whose captions are alike share them."""
    from zoo.data import open_dataset
    from zoo.metrics.embed import embed
    from zoo.metrics.retrieval import recall

    dataset = open_dataset(data, split, matcher.transform, matcher.tokenizer, language=language)
    encoders = (matcher.model.encode_image, matcher.model.encode_text)
    images, texts = embed(encoders, dataset, batch_size=batch_size, device=matcher.device)
    captions = [dataset.caption(dataset.row(i)) for i in range(len(dataset))]
    number = {caption: i for i, caption in enumerate(captions)}
    owner = [number[caption] for caption in captions]
    return recall(images, texts, image_owner=owner, text_owner=owner)


def figures(found: dict[str, Ranks]) -> str:
    """The table of both directions. Recall in percent."""
    names = {"picture_to_text": "picture to text", "text_to_picture": "text to picture"}
    ks = list(found["picture_to_text"].recall)
    rows = [
        [names[way], *(f"{100 * ranks.recall[k]:.1f}" for k in ks), f"{ranks.median_rank:g}", f"{ranks.mean_rank:.1f}"]
        for way, ranks in found.items()
    ]
    header = ["", *(f"R@{k}" for k in ks), "median rank", "mean rank"]
    return table(header, rows, right=range(1, len(header)))
