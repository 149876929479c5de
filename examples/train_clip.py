"""Trains a CLIP on pairs of pictures and captions.

    python examples/train_clip.py                                      # from nothing, on the packaged emoji
    python examples/train_clip.py --model clip-emoji-tiny --lr 1e-4    # goes on from published weights
    python examples/train_clip.py --pairs pairs.tsv --pictures img --model clip-base-p32-224 --lock-image
    python examples/train_clip.py --num-gpus 2                         # two processes, torch's DDP
    deepspeed --hostfile hostfile examples/train_clip.py               # or torchrun, or accelerate launch

Start the same command again and it goes on where it was stopped or killed. The run folder holds settings.json,
log.jsonl, checkpoints/, and at the end model.safetensors with its config.json and tokenizer, which
AutoLoader("txt_img_matching", "clip", weights=FOLDER) loads; so does best/ in it.

clip-emoji-tiny was trained by (about 50 minutes on two cores):

    python examples/train_clip.py --epochs 160 --precision bf16 --workers 1 \\
        --eval-interval 190 --save-interval 190
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import Dataset

from zoo import Trainer
from zoo.commands.model_options import find, vocabulary_files
from zoo.data import CsvDataset, Distort, clip_train_transform, clip_transform, collate_fn, open_dataset
from zoo.hub import File, fetch
from zoo.metrics.embed import embed
from zoo.metrics.retrieval import recall
from zoo.models.clip import Clip, ClipConfig, TextConfig
from zoo.models.clip_resnet import ResNetConfig
from zoo.tokenizers import ClipTokenizer
from zoo.training.options import add_options, trainer_words

EMOJI_MERGES = File(name="merges.txt.gz", packaged="emoji_bpe.txt.gz")  # 4,096 ids, by train_tokenizer.py
EMOJI_CLIP = ClipConfig(
    embed=128,
    image=ResNetConfig(size=64, layers=(1, 1, 1, 1), width=20),
    text=TextConfig(context=32, vocab=4096, width=128, depth=3, heads=4, activation="gelu"),
)
# What a run folder must agree on, besides the trainer's own settings, to be gone on with.
CHANGES_THE_DATA_OR_THE_MODEL = ("model", "pairs", "pictures", "language", "distort", "loss", "lock_image")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_clip.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a card or a run folder to start from; default: a small untrained one")
    parser.add_argument("--pairs", type=Path, help="tsv or csv of title and filepath; default: packaged emoji")
    parser.add_argument("--pictures", type=Path, help="folder that the filepaths of --pairs start from")
    parser.add_argument("--language", default="both", choices=("en", "zh", "both"), help="of the emoji captions")
    parser.add_argument("--distort", type=float, default=1.0, help="strength of the distortions of emoji, 0 for none")
    parser.add_argument("--chunk", type=int, help="embed so many pairs at a time: same result, less memory")
    parser.add_argument("--loss", default="softmax", choices=("softmax", "sigmoid"), help="CLIP's or SigLIP's")
    parser.add_argument("--lock-image", action="store_true", help="train the text tower only (LiT)")
    # Each pair is told from all others of the batch, of all processes.
    add_options(parser, batch_size=256, lr=2e-3, weight_decay=0.2, run_folder=Path("runs/clip"))
    return parser.parse_args(argv)


def build(args: argparse.Namespace) -> tuple[Clip, ClipTokenizer, dict[str, Path]]:
    """The model to train, its tokenizer, and the files of that."""
    if args.model:
        loader = find("txt_img_matching", "clip", args.model)
        return loader.get_model(), loader.get_tokenizer(), vocabulary_files(loader)
    torch.manual_seed(args.seed)
    merges, config = fetch(EMOJI_MERGES), replace(EMOJI_CLIP, loss=args.loss)
    return Clip(config), ClipTokenizer(merges, context_length=config.text.context), {EMOJI_MERGES.name: merges}


def open_data(args: argparse.Namespace, model: Clip, tokenizer: ClipTokenizer) -> tuple[Dataset, Dataset | None]:
    """Training pairs, and held-out pairs to measure retrieval on (None for pairs of one's own)."""
    config = model.config
    look = {"mean": config.mean, "std": config.std}
    plain = clip_transform(model.image_size, **look, resize=config.resize, interpolation=config.interpolation)
    if args.pairs:
        crop = clip_train_transform(model.image_size, **look)
        return CsvDataset(args.pairs, args.pictures, crop, tokenizer, sep=None), None
    distorted = Distort(transform=plain, strength=args.distort) if args.distort else plain
    train = open_dataset("emoji", "train", distorted, tokenizer, language=args.language)
    return train, open_dataset("emoji", "test", plain, tokenizer, language="en")


def measure(dataset: Dataset, model: Clip) -> dict[str, float]:
    """Held-out pictures against held-out captions: how often the right one is among the first k."""
    device = next(model.parameters()).device
    found = recall(*embed([model.encode_image, model.encode_text], dataset, device=device))
    return {f"{way}_R@{k}": share for way, ranks in found.items() for k, share in ranks.recall.items()}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    model, tokenizer, vocabulary = build(args)
    model.chunk = args.chunk
    if args.lock_image:
        model.lock("image")
    train, held_out = open_data(args, model, tokenizer)
    words = trainer_words(args)
    if not args.steps and not args.epochs:
        words["epochs"] = 10
    trainer = Trainer(
        experiment_name="clip",
        betas=(0.9, 0.98),
        eps=1e-6,
        about={name: str(getattr(args, name)) for name in CHANGES_THE_DATA_OR_THE_MODEL},
        best="picture_to_text_R@1" if held_out else "loss",
        maximise=True if held_out else None,
        beside=vocabulary,
        **words,
    )
    evaluate = partial(measure, held_out) if held_out else None
    trainer.train(model, train_dataset=train, collate_fn=collate_fn, evaluate=evaluate)


if __name__ == "__main__":
    main()
