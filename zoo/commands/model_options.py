"""The options that say which model to use, and the model that they name."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from zoo import AutoLoader
    from zoo.models.clip import Clip

TINY = "clip-emoji-tiny"
# What a tokenizer's files are called beside weights, apart from a folder of its own.
VOCABULARIES = (
    *("merges.txt.gz", "merges.txt", "vocab.txt", "vocab.json", "sentencepiece.bpe.model"),
    *("bpe.json.gz", "bpe.json", "bpe.model"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)


@dataclass(frozen=True, kw_only=True)
class Matcher:
    """A matching model ready to be asked, and the device that it is on."""

    model: Clip
    tokenizer: Any
    transform: Any
    device: Any


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, --weights, --model-dir, --device."""
    parser.add_argument("--model", default=TINY, help="a name that `zoo list` shows (default: %(default)s)")
    parser.add_argument(
        "--weights", metavar="PATH", help="a local file or folder with its weights, instead of a download"
    )
    parser.add_argument("--model-dir", metavar="FOLDER", help="where downloads live (default: the user's cache)")
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, ..., or auto: spread over all (default: cuda if there is one, else cpu)"
    )


def load_matcher(args: argparse.Namespace) -> Matcher:
    """The matching model that the options name, in evaluation mode."""
    from zoo import AutoLoader

    loader = AutoLoader(
        task_name="txt_img_matching",
        model_name=args.model,
        model_dir=args.model_dir,
        weights=args.weights,
        device=args.device,
    )
    model = loader.get_model().eval()
    return Matcher(
        model=model,
        tokenizer=loader.get_tokenizer(),
        transform=loader.get_transform(),
        device=next(model.parameters()).device,
    )


def find(task: str, family: str, name: str) -> AutoLoader:
    """A model by the name of its card, or by the folder that a training of its family left; on the CPU in fp32, to be
    a part of one that is trained."""
    from zoo import AutoLoader

    where: dict[str, Any] = {"device": "cpu", "dtype": "float32"}
    if Path(name).exists():
        return AutoLoader(task, family, weights=name, **where)
    return AutoLoader(task, name, **where)


def vocabulary_files(loader: AutoLoader) -> dict[str, Path]:
    """The files of its tokenizer by name, without what else lies beside its weights: what a Trainer keeps `beside` the
    new ones."""
    files = loader.tokenizer_files()
    if loader.weights is None:
        return files
    return {n: file for n, file in files.items() if n in VOCABULARIES or n.startswith("tokenizer/")}


def load_scorer(model: str, device: str | None) -> Callable:
    """The `rerank=` of a matching model of that name."""
    from zoo import AutoLoader
    from zoo.generation.rerank import clip_score

    loader = AutoLoader("txt_img_matching", model, device=device)
    return clip_score(loader.get_model(), loader.get_tokenizer(), loader.get_transform())
