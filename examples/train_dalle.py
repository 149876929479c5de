"""Trains a DALL-E on pairs of pictures and captions, over an image tokenizer that is trained already.

    deepspeed --hostfile hostfile examples/train_dalle.py               # from nothing, on the packaged emoji
    python examples/train_dalle.py --env-type pytorch                   # the same in one process
    python examples/train_dalle.py --pairs pairs.tsv --pictures img --vocabulary bpe.json.gz \\
        --dvae dvae-openai --model dalle-120m --precision bf16          # on your own pairs
    deepspeed --hostfile hostfile examples/train_dalle.py --model dalle-12b --precision bf16 \\
        --checkpoint-activations \\
        --deepspeed-config dalle_12b_zero3_offload ...              # `zoo plan dalle-12b` says what that takes

Loss, patterns of attention and crops are the paper's (Ramesh et al. 2021). A tenth of the captions are left out, so
that guidance works. At each evaluation the run folder gets samples/STEP.png. Start the same command again and it goes
on. The run folder is loaded by AutoLoader("text2img", "dalle", weights=FOLDER).

`zoo info dalle-emoji-tiny` says with which options that model was trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Subset

from zoo import AutoLoader, Trainer, catalog, distributed, weights
from zoo.commands.model_options import find, vocabulary_files
from zoo.commands.samples import draw_samples
from zoo.data import CsvDataset, collate_fn, dalle_train_transform, open_dataset
from zoo.data.codes import CodesDataset, check_codes, codes_collate, encode_dataset
from zoo.errors import SettingsError
from zoo.hub import File, fetch
from zoo.models.dalle import Dalle, DalleConfig
from zoo.models.dalle_transformer import DalleTransformer, TransformerConfig
from zoo.tokenizers import BpeTokenizer
from zoo.training.options import add_options, trainer_words

EMOJI_VOCABULARY = File(name="bpe.json.gz", packaged="emoji_dalle_bpe.json.gz")  # 2,048 ids, by train_tokenizer.py
HELD_OUT = 400  # pairs that each evaluation looks at
CHANGES_THE_DATA_OR_THE_MODEL = (
    *("model", "dvae", "pairs", "pictures", "vocabulary", "language", "bpe_dropout", "caption_dropout", "code_dropout"),
    *("width", "depth", "heads", "text_length", "attention", "codes"),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_dalle.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument("--pairs", type=Path, help="tsv or csv of title and filepath; default: packaged emoji")
    data.add_argument("--pictures", type=Path, help="folder that the filepaths of --pairs start from")
    data.add_argument("--language", default="both", choices=("en", "zh", "both"), help="of the emoji captions")
    data.add_argument("--codes", help="file of `zoo data encode` instead of pictures; 'once': encode before training")
    data.add_argument("--vocabulary", type=Path, help="of the captions, by train_tokenizer.py; default: the emoji's")
    data.add_argument("--bpe-dropout", type=float, default=0.1, help="merges left out in training (%(default)s)")
    data.add_argument("--caption-dropout", type=float, default=0.1, help="captions left out (%(default)s)")
    data.add_argument(
        "--code-dropout",
        type=float,
        help="up to this part of codes is read as others (1 on the emoji, 0 on --pairs)",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="a card's sizes, and weights if it has any; default: a small untrained one")
    model.add_argument("--dvae", default="dvae-emoji-tiny", help="image tokenizer: a name, or a folder (%(default)s)")
    model.add_argument("--width", type=int, default=256, help="without --model (%(default)s)")
    model.add_argument("--depth", type=int, default=6, help="without --model (%(default)s)")
    model.add_argument("--heads", type=int, default=4, help="without --model (%(default)s)")
    model.add_argument("--text-length", type=int, default=24, help="tokens of a caption, without --model (%(default)s)")
    model.add_argument("--attention", default="sparse", choices=("sparse", "full"), help="(%(default)s)")
    add_options(
        parser,
        batch_size=64,
        lr=1e-3,
        weight_decay=4.5e-2,
        clip_grad=4.0,
        run_folder=Path("runs/dalle"),
    )
    args = parser.parse_args(argv)
    if args.code_dropout is None:  # few pictures would be learnt by heart
        args.code_dropout = 0.0 if args.pairs else 1.0
    return args


def source(args: argparse.Namespace) -> tuple[AutoLoader | None, dict[str, Path]]:
    """The published model to go on with, if there is one, and the files of the tokenizer. Raises SettingsError."""
    card = catalog.find("text2img", args.model) if args.model else None
    if not card or not card.files:
        return None, {EMOJI_VOCABULARY.name: args.vocabulary or fetch(EMOJI_VOCABULARY)}
    if args.vocabulary:
        raise SettingsError(f"--vocabulary is of a new model: {args.model} knows the one that it was trained with")
    loader = AutoLoader("text2img", args.model, device="cpu", dtype="float32")
    return loader, vocabulary_files(loader)


def build(args: argparse.Namespace, trainer: Trainer, loader: AutoLoader | None, vocabulary: Path | None) -> Dalle:
    """The model to train, its transformer in pieces under ZeRO-3."""
    if loader:
        return loader.get_model()
    card = catalog.find("text2img", args.model) if args.model else None
    dvae = find("img_tokenizing", "dvae", args.dvae).get_model()
    if card:
        sizes = TransformerConfig.from_dict(card.config["transformer"] | {"attention": args.attention})
    else:
        words = BpeTokenizer(vocabulary)
        sizes = TransformerConfig(
            text_vocab=words.vocab_size,
            text_length=args.text_length,
            vocab=dvae.vocab,
            grid=dvae.grid,
            width=args.width,
            depth=args.depth,
            heads=args.heads,
            attention=args.attention,
            kernel=min(11, dvae.grid // 2 * 2 - 1),
        )
    config = DalleConfig(
        image=dvae.config, transformer=sizes, caption_dropout=args.caption_dropout, code_dropout=args.code_dropout
    )
    tokenizer = BpeTokenizer(vocabulary, context_length=sizes.text_length)
    torch.manual_seed(args.seed)
    return Dalle(config, dvae, trainer.build(lambda: DalleTransformer(sizes)), tokenizer)


def open_data(args: argparse.Namespace, model: Dalle, vocabulary: Path | None) -> tuple[Dataset, Dataset | None]:
    """Training pairs, with codes instead of pictures if that was asked for; and held-out pairs to measure on (None for
    pairs of one's own). `vocabulary`: of a BpeTokenizer, of which merges can be left out."""
    crop, noisy = dalle_train_transform(model.image_size), model.tokenizer
    if vocabulary:
        noisy = BpeTokenizer(vocabulary, model.transformer.config.text_length, dropout=args.bpe_dropout)
    if args.pairs:
        pairs = partial(CsvDataset, args.pairs, args.pictures, sep=None)
        return with_codes(args, model, pairs, noisy) or pairs(crop, noisy), None
    pairs = partial(open_dataset, "emoji", language=args.language)
    train = with_codes(args, model, partial(pairs, "train"), noisy) or pairs("train", crop, noisy)
    held_out = open_dataset("emoji", "test", crop, model.tokenizer)
    return train, Subset(held_out, range(0, len(held_out), len(held_out) // HELD_OUT))


def with_codes(args: argparse.Namespace, model: Dalle, pairs: Callable, tokenizer: BpeTokenizer) -> Dataset | None:
    """The pairs with their codes, from the file, or made now; None if pictures were asked for."""
    if not args.codes:
        return None
    pictures = pairs(dalle_train_transform(model.image_size), None)
    if args.codes == "once":
        codes = encode_dataset(pictures, {"codes": model.dvae.encode}, progress=distributed.rank() == 0)["codes"]
    else:
        codes = check_codes(weights.read(args.codes), weights.read_config(args.codes), pictures, model.dvae)
    return CodesDataset(pairs(None, tokenizer), codes)


@torch.no_grad()
def measure(dataset: Dataset, model: Dalle) -> dict[str, float]:
    """The loss and its parts on held-out pairs."""
    device = next(model.parameters()).device
    numbers: dict[str, float] = {}
    for batch in DataLoader(dataset, batch_size=64, collate_fn=collate_fn):
        for name, value in model(text=batch["text"].to(device), image=batch["image"].to(device)).items():
            numbers[name] = numbers.get(name, 0.0) + float(value) * len(batch["text"]) / len(dataset)
    return numbers


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    words = trainer_words(args)
    if not args.steps and not args.epochs:
        words["epochs"] = 10
    loader, files = source(args)
    vocabulary = files.get(EMOJI_VOCABULARY.name)
    trainer = Trainer(
        experiment_name="dalle",
        betas=(0.9, 0.96),
        about={name: str(getattr(args, name)) for name in CHANGES_THE_DATA_OR_THE_MODEL},
        best="loss",
        beside=files,
        **words,
    )
    model = build(args, trainer, loader, vocabulary)
    train, held_out = open_data(args, model, vocabulary)

    def evaluate(shown: Dalle) -> dict[str, float]:
        draw_samples(shown, args.run_folder / f"samples/{trainer.step:06}.png")
        return measure(held_out, shown) if held_out else {}

    trainer.train(model, train_dataset=train, collate_fn=codes_collate if args.codes else collate_fn, evaluate=evaluate)


if __name__ == "__main__":
    main()
