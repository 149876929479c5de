"""`zoo match`: which caption fits each picture."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.commands.model_options import Matcher, add_model_options, load_matcher
from zoo.commands.tables import as_json, fit, width
from zoo.errors import SettingsError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

BATCH = 64  # pictures embedded at a time
EXAMPLES = """\
examples:
  zoo match cat.png dog.png --text "a cat" --text "a dog"
  zoo match photo.jpg --text "a beach" --text "a street" --model clip-base-p32-224 --plot match.png
"""


def register(commands: argparse._SubParsersAction, **settings: object) -> None:
    """Adds the command."""
    parser = commands.add_parser("match", help="which caption fits each picture", epilog=EXAMPLES, **settings)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture files")
    parser.add_argument(
        "--text", action="append", default=[], metavar="CAPTION", help="a caption; give it twice or more"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the probabilities of all pairs into this picture")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the probability of each caption for each picture, over the captions given."""
    from zoo.data import open_image

    captions = [text.strip() for text in args.text]
    if len(captions) < 2 or not all(captions):
        raise SettingsError(
            f"a match chooses among two captions or more; there are {len([c for c in captions if c])}. "
            'Give each with --text: --text "a cat" --text "a dog"'
        )
    images = [open_image(path, mode=None) for path in args.images]
    matcher = load_matcher(args)
    probabilities = match(matcher, images, captions).tolist()
    if args.plot:
        plot(Path(args.plot), images, captions, probabilities, f"{args.model}: probability of each caption")
    if args.json:
        print(as_json([found(*pair, captions) for pair in zip(args.images, probabilities, strict=True)]))
        return 0
    for path, row in zip(args.images, probabilities, strict=True):
        print(path)
        print(bars(captions, row))
    if args.plot:
        print(f"drawn: {args.plot}")
    return 0


def match(matcher: Matcher, images: list[Image], captions: list[str]) -> Tensor:
    """N pictures and M captions -> probabilities (N, M): the softmax of the similarities over the captions."""
    import torch

    tokens = matcher.tokenizer.tokenize_as_tensor(captions).to(matcher.device)
    rows = []
    with torch.inference_mode():
        for start in range(0, len(images), BATCH):
            batch = torch.stack([matcher.transform(image) for image in images[start : start + BATCH]])
            rows.append(matcher.model.similarity(batch.to(matcher.device), tokens).float().softmax(-1).cpu())
    return torch.cat(rows)


def found(path: str, row: list[float], captions: list[str]) -> dict:
    """What JSON says of a picture."""
    best = max(range(len(row)), key=row.__getitem__)
    pairs = [{"text": text, "probability": p} for text, p in zip(captions, row, strict=True)]
    return {"image": path, "best": captions[best], "captions": pairs}


def bars(captions: list[str], row: list[float]) -> str:
    """A line for each caption in the order given, with its probability as a number and a bar; the best has a star."""
    best = max(range(len(row)), key=row.__getitem__)
    places = min(max(width(text) for text in captions), 48)
    return "\n".join(
        f"  {'*' if i == best else ' '} {fit(text, places)}  {100 * p:5.1f} %  {'#' * round(20 * p)}".rstrip()
        for i, (text, p) in enumerate(zip(captions, row, strict=True))
    )


def plot(path: Path, images: list[Image], captions: list[str], probabilities: list[list[float]], title: str) -> None:
    """Draws the map of pictures against captions into a file. Raises SettingsError on a name that is no picture's."""
    from zoo.pictures import similarity_map

    canvas = similarity_map(images, captions, probabilities, title=title, span=(0, 1))
    try:
        canvas.save(path)
    except ValueError as error:  # Pillow knows no format of this ending
        raise SettingsError(f"--plot {path}: {error}; end the name in .png") from error
