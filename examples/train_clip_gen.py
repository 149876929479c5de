"""Trains a CLIP-GEN on pictures alone: it learns to draw them from their own CLIP embeddings, and then draws
from those of texts (Wang et al. 2022). No caption is read.

    python examples/train_clip_gen.py                               # from nothing, on the packaged emoji
    python examples/train_clip_gen.py --ds FOLDER --vqgan runs/vqgan --clip clip-base-p32-224 \\
        --model clip-gen-medium --dropout 0.1 --precision bf16      # on your pictures, the release's sizes
    deepspeed --hostfile hostfile examples/train_clip_gen.py        # or zoo launch, torchrun, --num-gpus 2

--ds is a named data set, a folder of pictures or a file of records (.ffr); --vqgan and --clip are names of models, or
folders that train_vqgan.py and train_clip.py left. At each evaluation the run folder gets samples/STEP.png, drawn from
texts. Start the same command again and it goes on. The run folder is loaded by
AutoLoader("text2img", "clip-gen", weights=FOLDER).

`zoo info clip-gen-emoji-tiny` says with which options that model was trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, StackDataset, Subset

from zoo import AutoLoader, Trainer, catalog, distributed, weights
from zoo.commands.model_options import find, vocabulary_files
from zoo.commands.samples import draw_samples
from zoo.data import collate_fn, dvae_train_transform, list_datasets, open_pictures, unit_transform
from zoo.data.codes import check_codes, check_embeddings, encode_dataset
from zoo.models.clip_gen import ClipGen, ClipGenConfig
from zoo.models.clip_gen_transformer import ClipGenTransformer, ClipGenTransformerConfig
from zoo.training.options import add_options, trainer_words

HELD_OUT = 400  # pictures that each evaluation looks at
CHANGES_THE_DATA_OR_THE_MODEL = (
    *("ds", "vqgan", "clip", "cache", "views", "model", "width", "depth", "heads", "dropout"),
    *("condition_dropout", "noise", "code_dropout", "embedding_weight"),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_clip_gen.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument("--ds", default="emoji", help="a named data set, a folder, or records (%(default)s)")
    data.add_argument("--vqgan", default="vqgan-emoji-tiny", help="a name, or a folder (%(default)s)")
    data.add_argument("--clip", default="clip-emoji-tiny", help="a name, or a folder (%(default)s)")
    data.add_argument(
        "--cache", help="file of `zoo data encode --matcher` instead of pictures; 'once': encode before training"
    )
    data.add_argument(
        "--views", type=int, default=2, help="of each picture, by chance, with --cache once (%(default)s)"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="a card's sizes; default: a small one")
    model.add_argument("--width", type=int, default=256, help="without --model (%(default)s)")
    model.add_argument("--depth", type=int, default=6, help="without --model (%(default)s)")
    model.add_argument("--heads", type=int, default=4, help="without --model (%(default)s)")
    model.add_argument("--dropout", type=float, default=0.0, help="the release: 0.1 (%(default)s)")
    model.add_argument("--condition-dropout", type=float, default=0.1, help="embeddings left out (%(default)s)")
    model.add_argument("--noise", type=float, default=0.0, help="added to embeddings, by length (%(default)s)")
    model.add_argument(
        "--code-dropout",
        type=float,
        help="up to this part of codes is read as others (1 on the emoji, else 0)",
    )
    model.add_argument("--embedding-weight", type=float, default=0.0, help="of the paper's second loss (%(default)s)")
    add_options(
        parser, batch_size=64, lr=1e-3, weight_decay=4.5e-2, clip_grad=4.0, run_folder=Path("runs/clip_gen")
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.code_dropout is None:  # few pictures would be learnt by heart
        args.code_dropout = 1.0 if args.ds.lower() == "emoji" else 0.0
    return args


def source(args: argparse.Namespace) -> AutoLoader:
    """What gives the model its tokenizer: a model to go on with, or the CLIP that a new one reads."""
    card = catalog.find("text2img", args.model) if args.model else None
    if card and card.files:
        return AutoLoader("text2img", args.model, device="cpu", dtype="float32")
    return find("txt_img_matching", "clip", args.clip)


def build(args: argparse.Namespace, trainer: Trainer, loader: AutoLoader) -> ClipGen:
    """The model to train, its transformer in pieces under ZeRO-3."""
    if loader.card.task == "text2img":
        return loader.get_model()
    card = catalog.find("text2img", args.model) if args.model else None
    clip, vqgan = loader.get_model(), find("img_tokenizing", "vqgan", args.vqgan).get_model()
    if card:
        sizes = ClipGenTransformerConfig.from_dict(card.config["transformer"] | {"dropout": args.dropout})
    else:
        sizes = ClipGenTransformerConfig(
            embed=clip.config.embed,
            vocab=vqgan.vocab,
            grid=vqgan.grid,
            width=args.width,
            depth=args.depth,
            heads=args.heads,
            dropout=args.dropout,
        )
    how = {n: getattr(args, n) for n in ("condition_dropout", "noise", "code_dropout", "embedding_weight")}
    config = ClipGenConfig(clip=clip.config, image=vqgan.config, transformer=sizes, **how)
    torch.manual_seed(args.seed)
    return ClipGen(config, clip, vqgan, trainer.build(lambda: ClipGenTransformer(sizes)), loader.get_tokenizer())


def open_data(args: argparse.Namespace, model: ClipGen) -> tuple[Dataset, Dataset | None]:
    """Training pictures, or what was computed of them; and held-out pictures to measure on (None where the data set
    has none)."""
    train = open_pictures(args.ds, "train", dvae_train_transform(model.image_size))
    if args.cache:
        train = cached(args, model, train)
    if args.ds.lower() not in list_datasets():
        return train, None
    held_out = open_pictures(args.ds, "test", unit_transform(model.image_size))
    return train, Subset(held_out, range(0, len(held_out), -(-len(held_out) // HELD_OUT)))


def cached(args: argparse.Namespace, model: ClipGen, pictures: Dataset) -> Dataset:
    """Codes and embeddings in place of pictures, from the file, or made now. Raises DataError."""
    if args.cache == "once":
        torch.manual_seed(args.seed)  # of the views: the same on every rank, and when it goes on
        encodes = {"codes": model.vqgan.encode, "embeddings": model.embed}
        found = encode_dataset(
            ConcatDataset([pictures] * args.views), encodes, progress=distributed.rank() == 0
        )  # fmt: skip
        return StackDataset(codes=found["codes"], embedding=found["embeddings"])
    state, about = weights.read(args.cache), weights.read_config(args.cache)
    codes = check_codes(state, about, pictures, model.vqgan)
    return StackDataset(codes=codes, embedding=check_embeddings(state, about, codes, model.clip))


@torch.no_grad()
def measure(dataset: Dataset, model: ClipGen) -> dict[str, float]:
    """The loss on held-out pictures."""
    device = next(model.parameters()).device
    loss = 0.0
    for batch in DataLoader(dataset, batch_size=64, collate_fn=collate_fn):
        loss += float(model(image=batch["image"].to(device))["loss"]) * len(batch["image"]) / len(dataset)
    return {"loss": loss}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    words = trainer_words(args)
    if not args.steps and not args.epochs:
        words["epochs"] = 10
    loader = source(args)
    trainer = Trainer(
        experiment_name="clip_gen",
        betas=(0.9, 0.95),
        about={name: str(getattr(args, name)) for name in CHANGES_THE_DATA_OR_THE_MODEL},
        best="loss",
        beside=vocabulary_files(loader),
        **words,
    )
    model = build(args, trainer, loader)
    train, held_out = open_data(args, model)

    def evaluate(shown: ClipGen) -> dict[str, float]:
        draw_samples(shown, args.run_folder / f"samples/{trainer.step:06}.png")
        return measure(held_out, shown) if held_out else {}

    trainer.train(model, train_dataset=train, collate_fn=None if args.cache else collate_fn, evaluate=evaluate)


if __name__ == "__main__":
    main()
