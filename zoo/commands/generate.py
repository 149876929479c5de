"""`zoo generate`: pictures of prompts."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.commands.draw_options import add_draw_options, draw_words
from zoo.commands.model_options import add_model_options, load_scorer

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from zoo import AutoLoader

TINY = "dalle-emoji-tiny"
EXAMPLES = """\
examples:
  zoo generate "a red apple"
  zoo generate "red apple" "红心" --n 4 --guidance 3
  zoo generate "volcano" --n 2 --candidates 32 --rerank clip-emoji-tiny
  zoo generate "cow face" --first-rows cow.png 3 --preview now.png
  zoo generate "cow face" --model sd-emoji-tiny --image cat.png --strength 0.6
  zoo generate "a (red:1.3) apple" --model stable-diffusion-v1-5 --sampler dpm++2m --steps 25 --size 512x768
"""


def register(commands: argparse._SubParsersAction, **settings: object) -> None:
    """Adds the command."""
    parser = commands.add_parser("generate", help="draw pictures of prompts", epilog=EXAMPLES, **settings)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to draw; '' is a picture of anything")
    parser.add_argument("--n", type=int, default=1, help="pictures of each prompt (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("generated"), help="folder to write to (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next has the next (default: 0)")
    best = parser.add_argument_group("how to choose among pictures")
    best.add_argument("--candidates", type=int, metavar="N", help="draw so many and keep the best --n")
    best.add_argument("--rerank", metavar="MODEL", help="the matching model that says which are best")
    add_draw_options(parser)
    begin = parser.add_argument_group("how to begin")
    begin.add_argument("--size", type=size, metavar="WxH", help="pixels, of Stable Diffusion (default: the model's)")
    begin.add_argument("--image", metavar="PICTURE", help="draw over this one, with Stable Diffusion")
    begin.add_argument("--mask", metavar="PICTURE", help="white where --image is to be drawn anew")
    begin.add_argument("--strength", type=float, help="0 leaves --image as it is, 1 leaves nothing (default: 0.8)")
    begin.add_argument(
        "--first-rows",
        nargs=2,
        metavar=("PICTURE", "ROWS"),
        help="with so many rows of this picture's codes, of DALL-E and CLIP-GEN",
    )
    parser.add_argument(
        "--preview",
        type=Path,
        metavar="FILE",
        help="write the pictures so far to this file, row by row or step by step",
    )
    added = parser.add_argument_group("what is added to Stable Diffusion")
    added.add_argument("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="a LoRA; may be repeated")
    added.add_argument("--concept", action="append", default=[], metavar="FILE", help="a word of textual inversion")
    parser.add_argument("--batch-size", type=int, metavar="N", help="pictures at a time (default: all)")
    add_model_options(parser)
    parser.set_defaults(run=run, model=TINY)


def run(args: argparse.Namespace) -> int:
    """Writes each picture, and all in one grid where there are several."""
    from zoo import AutoLoader
    from zoo.data import open_image
    from zoo.pictures import grid

    loader = AutoLoader("text2img", args.model, args.model_dir, args.weights, args.device)
    model = loader.get_model()
    add_files(model, args.lora, args.concept)
    words = draw_words(args, model, "size", "strength", "image", "mask", "first_rows")
    for name in words.keys() & {"image", "mask"}:
        words[name] = open_image(words[name])
    if args.first_rows:
        words["first_rows"] = first_rows(loader, *args.first_rows)
    if args.rerank:
        words["rerank"] = load_scorer(args.rerank, args.device)
    if args.preview:
        words["preview"] = lambda step, pictures: show(pictures, args.preview)
    found = model.generate(
        args.prompts, args.n, args.seed, candidates=args.candidates, batch_size=args.batch_size, **words
    )
    args.out.mkdir(parents=True, exist_ok=True)
    for prompt, pictures in zip(args.prompts, found, strict=True):
        for picture in pictures:
            print(save(picture, args.out, prompt))
    if sum(map(len, found)) > 1:
        captions = [prompt for prompt, pictures in zip(args.prompts, found, strict=True) for _ in pictures]
        columns = args.n if args.n > 1 else min(len(captions), 8)
        print(save(grid([p for pictures in found for p in pictures], columns, captions), args.out, "grid"))
    return 0


def size(text: str) -> tuple[int, int]:
    """ "512x768" -> (512, 768)."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size like 512x768")
    return int(width), int(height)


def add_files(model: object, loras: list[str], concepts: list[str]) -> None:
    """Adds what --lora and --concept name; says by which token a concept is called. Raises SettingsError for a model of
    another kind."""
    if not (loras or concepts):
        return
    from zoo.additions import add_concept, add_lora
    from zoo.errors import SettingsError
    from zoo.models.stable_diffusion import StableDiffusion

    if not isinstance(model, StableDiffusion):
        raise SettingsError(f"--lora and --concept are for Stable Diffusion, not for {type(model).__name__}")
    for file in concepts:
        print(f"{file}: say {add_concept(model, file)} in a prompt")
    for text in loras:
        file, colon, scale = text.rpartition(":")
        scaled = colon and re.fullmatch(r"-?\d*\.?\d+", scale)
        add_lora(model, file if scaled else text, float(scale) if scaled else 1.0)


def save(picture: Image, folder: Path, prompt: str) -> Path:
    """Writes to the first free of NAME.png, NAME-2.png, ..., since a picture that is there may be dear to someone."""
    stem = "-".join(re.findall(r"\w+", prompt.lower()))[:40].strip("-") or "picture"
    number, path = 1, folder / f"{stem}.png"
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.png"
    picture.save(path)
    return path


def show(pictures: Tensor, path: Path) -> None:
    """Pictures (B, 3, H, W) of 0..1 as a grid in a file."""
    from zoo.generation.text_to_image import to_pil
    from zoo.pictures import grid

    grid(to_pil(pictures), 8).save(path)


def first_rows(loader: AutoLoader, picture: str, rows: str) -> tuple[Tensor, int]:
    """The two words of --first-rows. Raises SettingsError, and what `open_image` does."""
    from zoo.data import open_image
    from zoo.errors import SettingsError

    if not rows.isdecimal():
        raise SettingsError(f"--first-rows PICTURE ROWS: {rows!r} is no number of rows")
    return loader.get_transform()(open_image(picture)), int(rows)
