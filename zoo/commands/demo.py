"""`zoo demo`: what zoo does, on what is packaged: no network, a few minutes on two cores."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.commands.evaluate import figures, in_words, retrieval, zero_shot
from zoo.commands.match import match
from zoo.commands.model_options import Matcher, add_model_options, load_matcher
from zoo.commands.tables import in_millions

if TYPE_CHECKING:
    from PIL.Image import Image

STEPS, BATCH = 30, 64
CANDIDATES = 8
PAINTERS = {  # what is said of each, and how it draws
    "dalle-emoji-tiny": ("a DALL-E", {"temperature": 0.7}),
    "clip-gen-emoji-tiny": ("which never saw a caption", {"temperature": 0.7}),
    "sd-emoji-tiny": ("a Stable Diffusion", {}),
}
EDITOR = "sd-emoji-tiny"
# Ten concepts of the test split from nine groups, chosen before any model was trained on it.
CAPTIONS = (
    *("tulip", "cow face", "tomato", "volcano", "oncoming police car"),
    *("candle", "bullseye", "thumbs up", "drooling face", "flag: Brazil"),
)

EDITS = {"drooling face": "angry face", "cow face": "cat face"}  # a picture of the test split, and what it shall be
PROMPTS = (*CAPTIONS, "红心", "火山", "旗: 法国", "猫脸")


def register(commands: argparse._SubParsersAction, **settings: object) -> None:
    """Adds the command."""
    parser = commands.add_parser(
        "demo", help="a tour: match, measure, classify, draw and train, all offline", **settings
    )
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder for pictures and the run (default: demo)"
    )
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tells, step by step, what is done and what came of it."""
    start = time.monotonic()
    args.out.mkdir(parents=True, exist_ok=True)
    say(1, f"loading {args.model}")
    matcher = load_matcher(args)
    params, side = sum(p.numel() for p in matcher.model.parameters()), matcher.model.image_size
    print(f"    {in_millions(params)} parameters, {side} x {side} pixels, {matcher.device}")

    say(2, "matching ten pictures it has not seen with their captions, English and Chinese")
    picture = args.out / "match.png"
    for language, hits, count in draw_matches(matcher, picture):
        print(f"    {language}: the right caption is first for {hits} of {count}")
    print(f"    drawn: {picture}")

    say(3, "finding the caption of each test picture among all of them, and the reverse")
    print("    " + figures(retrieval(matcher, "emoji", "test")).replace("\n", "\n    "))

    say(4, "telling flags, faces, hearts, ... apart by the nearest word, without having learnt kinds")
    print(f"    {in_words(zero_shot(matcher, 'emoji', 'test'))}")

    say(5, f"drawing {len(PROMPTS)} prompts, {CANDIDATES} pictures of each; {args.model} says which is best")
    for name, (about, words) in PAINTERS.items():
        picture = args.out / f"{name}.png"
        draw_prompts(name, matcher, picture, words)
        print(f"    by {name}, {about}: {picture}")
    draw_edits(matcher, args.out / "edited.png")
    print(f"    pictures drawn over and mended by {EDITOR}: {args.out / 'edited.png'}")

    folder = new_folder(args.out / "run")
    say(6, f"training a new model of the same size for {STEPS} steps of {BATCH} pairs")
    for line in train(matcher, folder):
        print(f"    step {line['step']:3}  loss {line['loss']:.3f}")
    print(f"    kept in {folder}: settings.json, log.jsonl, checkpoints, model.safetensors")

    say(7, f"done in {time.monotonic() - start:.0f} s; look at the pictures in {args.out}, then try")
    print('    zoo match YOUR.png --text "a cat" --text "a dog" --plot match.png')
    print('    zoo generate "a red apple" --n 4 --model sd-emoji-tiny')
    print("    zoo train clip --run-folder runs/first --steps 500")
    print("    zoo list")
    return 0


def say(number: int, text: str) -> None:
    """A step of the tour."""
    print(f"[{number}/7] {text}", flush=True)


def draw_matches(matcher: Matcher, path: Path) -> Iterator[tuple[str, int, int]]:
    """Draws the ten pictures against their captions, English above Chinese -> language, hits and pictures of each."""
    from zoo.data import open_dataset
    from zoo.pictures import similarity_map

    dataset = open_dataset("emoji", "test", language=None)
    rows = {dataset.row(i)["caption_en"]: i for i in range(len(dataset))}
    chosen = [rows[caption] for caption in CAPTIONS if caption in rows]
    images = [dataset[i][0] for i in chosen]
    right = {(i, i) for i in range(len(chosen))}
    maps: list[Image] = []
    for language, name in (("en", "English"), ("zh", "Chinese")):
        captions = [dataset.row(i)[f"caption_{language}"] for i in chosen]
        scores = match(matcher, images, captions)
        title = f"Ten pictures it has not seen, {name} captions: probability of each caption"
        maps.append(similarity_map(images, captions, scores.tolist(), right=right, title=title, span=(0, 1), cell=64))
        yield name, sum(int(best) == i for i, best in enumerate(scores.argmax(1))), len(chosen)
    beside(maps).save(path)


def draw_prompts(name: str, matcher: Matcher, path: Path, words: dict) -> None:
    """Draws the best of several pictures of each prompt, by the model of that name, into a file."""
    from zoo import AutoLoader
    from zoo.generation.rerank import clip_score
    from zoo.pictures import grid

    model = AutoLoader("text2img", name, device=matcher.device).get_model()
    rerank = clip_score(matcher.model, matcher.tokenizer, matcher.transform)
    drawn = model.generate(PROMPTS, candidates=CANDIDATES, rerank=rerank, **words)
    grid([pictures[0] for pictures in drawn], 7, PROMPTS, cell=96).save(path)


def draw_edits(matcher: Matcher, path: Path) -> None:
    """Pictures it has not seen, drawn over after a prompt, and drawn anew where they are hidden, into a file."""
    from PIL import Image, ImageDraw

    from zoo import AutoLoader
    from zoo.data import open_dataset
    from zoo.pictures import grid

    model = AutoLoader("text2img", EDITOR, device=matcher.device).get_model()
    dataset = open_dataset("emoji", "test", language=None)
    rows = {dataset.row(i)["caption_en"]: i for i in range(len(dataset))}
    pictures, captions = [], []
    for caption, prompt in ((caption, prompt) for caption, prompt in EDITS.items() if caption in rows):
        image = dataset[rows[caption]][0].convert("RGB").resize((model.image_size,) * 2)
        pictures.append(image)
        captions.append(caption)
        for strength in (0.5, 0.7):
            pictures.append(model.generate(prompt, image=image, strength=strength, progress=False)[0][0])
            captions.append(f"{prompt}, {strength}")
        mask = Image.new("L", image.size)
        ImageDraw.Draw(mask).rectangle((0, image.height // 2, image.width, image.height), fill=255)
        hidden = image.copy()
        hidden.paste("grey", mask=mask)
        mended = model.generate(caption, image=image, mask=mask, strength=1.0, progress=False)[0][0]
        pictures += [hidden, mended]
        captions += ["hidden", f"{caption}, mended"]
    grid(pictures, 5, captions, cell=96).save(path)


def beside(maps: list[Image]) -> Image:
    """Pictures from left to right on white."""
    from PIL import Image

    canvas = Image.new("RGB", (sum(m.width for m in maps), max(m.height for m in maps)), "white")
    for i, picture in enumerate(maps):
        canvas.paste(picture, (sum(m.width for m in maps[:i]), 0))
    return canvas


def train(matcher: Matcher, folder: Path) -> Iterator[dict]:
    """Trains a CLIP of the same sizes from scratch -> the lines of its log."""
    import torch

    from zoo import Trainer
    from zoo.data import collate_fn, open_dataset
    from zoo.models.clip import Clip

    torch.manual_seed(0)
    model = Clip(matcher.model.config)
    trainer = Trainer(
        env_type="pytorch",
        steps=STEPS,
        batch_size=BATCH,
        lr=1e-3,
        log_interval=5,
        run_folder=folder,
        pytorch_device=matcher.device,
        progress=False,
    )
    dataset = open_dataset("emoji", "train", matcher.transform, matcher.tokenizer)
    trainer.train(model, train_dataset=dataset, collate_fn=collate_fn)
    for line in (folder / "log.jsonl").read_text().splitlines():
        yield json.loads(line)


def new_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, ... that does not exist: a run folder that exists is resumed."""
    number, folder = 1, wanted
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder
