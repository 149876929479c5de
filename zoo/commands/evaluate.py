"""`zoo eval`: figures of a model on a named data set."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING

from zoo.commands import evaluate_dvae, evaluate_text2img
from zoo.commands.model_options import Matcher, add_model_options, load_matcher
from zoo.commands.tables import as_json, table

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.metrics.retrieval import Ranks

# Words that many captions of the emoji set hold; most of them are never a whole caption.
KINDS = ("flag", "face", "heart", "button", "hand", "woman", "man", "clock", "cat", "moon", "book", "sun")
EXAMPLES = """\
examples:
  zoo eval clip
  zoo eval dvae
  zoo eval text2img

`zoo eval FAMILY --help` says more about each.
"""
CLIP_EXAMPLES = """\
examples:
  zoo eval clip
  zoo eval clip --model clip-emoji-tiny --data emoji --split test --language zh
  zoo eval clip --metric zero-shot
  zoo eval clip --metric linear-probe
"""


def register(commands: argparse._SubParsersAction, **settings: object) -> None:
    """Adds the command, with a command of its own for each family."""
    command = commands.add_parser("eval", help="measure a model on a data set", epilog=EXAMPLES, **settings)
    families = command.add_subparsers(title="families", metavar="FAMILY", required=True)
    parser = families.add_parser(
        "clip", help="the retrieval of captions and pictures", epilog=CLIP_EXAMPLES, **settings
    )
    parser.add_argument(
        "--metric",
        choices=("retrieval", *LABELLED),
        default="retrieval",
        help="retrieval of captions and pictures; or the kind of a picture (flag, face, ...) by the nearest word or "
        "by a linear classifier on the embeddings of the train split (default: %(default)s)",
    )
    parser.add_argument("--language", choices=("en", "zh"), default="en", help="of the captions (default: %(default)s)")
    add_options(parser)
    add_model_options(parser)
    parser.set_defaults(run=run)
    evaluate_dvae.register(families, add_options, **settings)
    evaluate_text2img.register(families, add_options, **settings)


def add_options(parser: argparse.ArgumentParser) -> None:
    """--data, --split, --batch-size, --json."""
    parser.add_argument("--data", default="emoji", help="a named data set (default: %(default)s)")
    parser.add_argument("--split", default="test", help="which part of it (default: %(default)s)")
    parser.add_argument("--batch-size", type=count, default=256, help="samples at a time (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def count(text: str) -> int:
    """A number of samples. argparse names the option in its error."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: give 1 or more")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Prints how often a picture finds its caption, and a caption its picture."""
    from dataclasses import asdict

    from zoo.data import open_dataset

    open_dataset(args.data, args.split)  # a wrong name is said before a model is loaded
    matcher = load_matcher(args)
    if args.metric in LABELLED:
        labelled = LABELLED[args.metric](matcher, args.data, args.split, args.batch_size)
        print(as_json(labelled) if args.json else f"{args.model} on {args.data}, {args.split}: {in_words(labelled)}")
        return 0
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


def kind_of(caption: str) -> str | None:
    """The one kind that an English caption names; None if it names none, or several."""
    named = set(re.findall(r"\w+", caption.lower())) & set(KINDS)
    return named.pop() if len(named) == 1 else None


def of_a_kind(matcher: Matcher, data: str, split: str, batch_size: int) -> tuple[Tensor, Tensor]:
    """The embeddings (N, E) of the pictures whose caption names one kind, and the number of that kind (N,)."""
    import torch
    from torch.utils.data import Subset

    from zoo.data import open_dataset
    from zoo.metrics.embed import embed

    dataset = open_dataset(data, split, matcher.transform, matcher.tokenizer)
    kinds = {i: kind_of(dataset.caption(dataset.row(i))) for i in range(len(dataset))}
    chosen = [i for i, kind in kinds.items() if kind]
    encoders = (matcher.model.encode_image,)
    (images,) = embed(encoders, Subset(dataset, chosen), batch_size=batch_size, device=matcher.device)
    return images, torch.tensor([KINDS.index(kinds[i]) for i in chosen])


def zero_shot(matcher: Matcher, data: str, split: str, batch_size: int = 256) -> dict[str, float]:
    """How often the word of a picture's kind is nearer to it than those of the other kinds. No kind was learnt."""
    import torch

    from zoo.metrics.zero_shot import accuracy, class_weights, logits

    def encode(texts: list[str]) -> torch.Tensor:
        tokens = matcher.tokenizer.tokenize_as_tensor(texts).to(matcher.device)
        with torch.inference_mode():
            return matcher.model.encode_text(tokens).float().cpu()

    images, kinds = of_a_kind(matcher, data, split, batch_size)
    # The set's captions are bare words, without "a photo of".
    return shares(accuracy(logits(images, class_weights(KINDS, encode, prompts=("{}",))), kinds).top1, kinds)


def probe(matcher: Matcher, data: str, split: str, batch_size: int = 256) -> dict[str, float]:
    """How often a linear classifier, fitted to the embeddings of the train split, names a picture's kind."""
    from zoo.metrics.linear_probe import linear_probe

    train, test = (of_a_kind(matcher, data, part, batch_size) for part in ("train", split))
    return shares(linear_probe(train, test).accuracy, test[1])


LABELLED = {"zero-shot": zero_shot, "linear-probe": probe}


def shares(right: float, kinds: Tensor) -> dict[str, float]:
    """An accuracy and what it is to be held against: always answering the commonest kind."""
    counts = kinds.bincount()
    commonest = float(counts.max() / len(kinds))
    return {"accuracy": right, "pictures": len(kinds), "kinds": int((counts > 0).sum()), "commonest": commonest}


def in_words(found: dict[str, float]) -> str:
    """The shares as a phrase."""
    return (
        f"{100 * found['accuracy']:.1f} % right of {found['pictures']} pictures of {found['kinds']} kinds; "
        f"always saying the commonest: {100 * found['commonest']:.1f} %"
    )


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
