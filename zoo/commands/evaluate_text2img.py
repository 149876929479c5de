"""`zoo eval text2img`: whether a matching model finds the prompts of drawn pictures again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.commands.draw_options import add_draw_options, draw_words
from zoo.commands.generate import TINY
from zoo.commands.model_options import TINY as TINY_CLIP
from zoo.commands.model_options import Matcher, add_model_options, load_matcher
from zoo.commands.tables import as_json

if TYPE_CHECKING:
    from PIL.Image import Image

EXAMPLES = """\
examples:
  zoo eval text2img
  zoo eval text2img --candidates 1 8 --guidance 3 --language zh
  zoo eval text2img --model clip-gen-emoji-tiny --judge runs/another-clip
  zoo eval text2img --model sd-emoji-tiny --steps 20 --batch-size 100
"""


def register(families: argparse._SubParsersAction, shared: Any, **settings: object) -> None:
    """Adds the family. `shared(parser)` adds the options that all families have."""
    parser = families.add_parser(
        "text2img", help="how often the caption is found again from the picture drawn", epilog=EXAMPLES, **settings
    )
    parser.add_argument("--language", choices=("en", "zh"), default="en", help="of the captions (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=500, help="captions, evenly over the split (default: 500)")
    parser.add_argument(
        "--candidates", type=int, nargs="+", default=[1, 8], metavar="N",
        help="of so many pictures the matching model takes the best; several: each in turn (default: 1 8)",
    )  # fmt: skip
    parser.add_argument(
        "--matcher",
        default=TINY_CLIP,
        help="the matching model that chooses: a name, or a folder (default: %(default)s)",
    )
    parser.add_argument("--judge", help="the one that is asked whose pictures they are (default: the same)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    add_draw_options(parser)
    shared(parser)
    add_model_options(parser)
    parser.set_defaults(run=run, model=TINY)


def run(args: argparse.Namespace) -> int:
    """Prints the share of pictures whose prompt is first among all captions of the split, for each --candidates."""
    from zoo import AutoLoader
    from zoo.data import open_dataset
    from zoo.generation.rerank import clip_score

    dataset = open_dataset(args.data, args.split, language=args.language)
    captions = list(dict.fromkeys(dataset.caption(dataset.row(i)) for i in range(len(dataset))))
    prompts = captions[:: max(1, len(captions) // args.prompts)][: args.prompts]
    model = AutoLoader("text2img", args.model, args.model_dir, args.weights, args.device).get_model()
    matcher = matching(args.matcher, args)
    judge = matching(args.judge, args) if args.judge else matcher
    rerank = clip_score(matcher.model, matcher.tokenizer, matcher.transform)
    words = draw_words(args, model, "batch_size")
    found = {}
    for candidates in args.candidates:
        drawn = model.generate(prompts, 1, args.seed, candidates=candidates, rerank=rerank, **words)
        found[candidates] = found_again(judge, [pictures[0] for pictures in drawn], prompts, captions)
    if args.json:
        about = {
            name: getattr(args, name) for name in ("model", "matcher", "judge", "data", "split", "language", "guidance")
        }
        print(as_json(about | {"prompts": len(prompts), "captions": len(captions), "recall": found}))
        return 0
    print(
        f"{args.model}: {len(prompts)} captions of {args.data}, {args.split}, each drawn; {args.judge or args.matcher} "
        "puts the right"
    )
    print(f"one of {len(captions)} captions")
    for candidates, shares in found.items():
        by = args.matcher if args.judge else "the same model"
        of = "of one picture" if candidates == 1 else f"of the best of {candidates}, by {by}"
        print("  " + ", ".join(f"{100 * share:5.1f} % in the first {k}" for k, share in shares.items()) + f": {of}")
    return 0


def matching(name: str, args: argparse.Namespace) -> Matcher:
    """The matching model of that name, or in the folder that train_clip.py left."""
    folder = Path(name).exists()
    named = {"model": "clip" if folder else name, "weights": name if folder else None}
    return load_matcher(argparse.Namespace(**named, model_dir=args.model_dir, device=args.device))


def found_again(matcher: Matcher, pictures: list[Image], prompts: list[str], captions: list[str]) -> dict[int, float]:
    """The share of pictures whose prompt is among the first 1, 5, 10 of all captions."""
    import torch

    from zoo.metrics.retrieval import ranks, summary

    with torch.inference_mode():
        images = torch.stack([matcher.transform(picture) for picture in pictures]).to(matcher.device)
        images = torch.cat([matcher.model.encode_image(part) for part in images.split(256)])
        tokens = matcher.tokenizer.tokenize_as_tensor(captions).to(matcher.device)
        texts = torch.cat([matcher.model.encode_text(part) for part in tokens.split(256)])
    owners = torch.tensor([captions.index(prompt) for prompt in prompts])
    images, texts = (torch.nn.functional.normalize(x.double().cpu(), dim=-1) for x in (images, texts))
    found = ranks(images, texts, owners, torch.arange(len(captions)), block=2**22)
    return summary(found, len(captions), (1, 5, 10)).recall
