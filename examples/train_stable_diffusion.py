"""Trains a Stable Diffusion on pairs of pictures and captions, over a VAE and a text tower that are trained already.

    python examples/train_stable_diffusion.py                       # from nothing, on the packaged emoji
    deepspeed --hostfile hostfile examples/train_stable_diffusion.py            # or zoo launch, torchrun, --num-gpus 2
    python examples/train_stable_diffusion.py --model stable-diffusion-v1-5 --pairs pairs.tsv --pictures img \\
        --lr 1e-5 --precision bf16 --checkpoint-activations         # goes on with published weights
    python examples/train_stable_diffusion.py --model stable-diffusion-v1-5 --pairs pairs.tsv --lora 16 --lr 1e-4

A tenth of the captions are left out, so that guidance works. Latents are computed once (--cache once) or on the fly. At
each evaluation the run folder gets samples/STEP.png, drawn by all ranks with the model that is trained. Start the same
command again and it goes on. The run folder is loaded by AutoLoader("text2img", "stable-diffusion", weights=FOLDER);
with --lora it also gets lora.safetensors, as diffusers reads it.

`zoo info sd-emoji-tiny` says with which options that model was trained.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, StackDataset, Subset

from zoo import AutoLoader, Trainer, distributed, weights
from zoo.commands.model_options import find
from zoo.commands.samples import draw_samples
from zoo.data import CsvDataset, collate_fn, dalle_train_transform, open_dataset, unit_transform
from zoo.data.codes import encode_dataset
from zoo.generation.noise_schedule import NoiseConfig
from zoo.models.kl_vae import sample_moments
from zoo.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from zoo.models.text_encoder import build_text
from zoo.models.unet import UNet, UNetConfig
from zoo.training.options import add_options, trainer_words

HELD_OUT, MEASURED = 400, 1000  # pairs that each evaluation looks at; and pictures that the scale is measured on
VOCABULARIES = ("merges.txt.gz", "vocab.txt", "tokenizer.json", "sentencepiece.bpe.model")
CHANGES_THE_DATA_OR_THE_MODEL = (
    *("model", "vae", "text", "pairs", "pictures", "language", "cache", "views", "widths", "blocks", "attention"),
    *("heads", "groups", "prediction", "zero_snr", "caption_dropout", "min_snr", "noise_offset"),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_stable_diffusion.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument("--pairs", type=Path, help="tsv or csv of title and filepath; default: packaged emoji")
    data.add_argument("--pictures", type=Path, help="folder that the filepaths of --pairs start from")
    data.add_argument("--language", default="both", choices=("en", "zh", "both"), help="of the emoji captions")
    data.add_argument("--cache", help="'once': the VAE's moments are computed before training; default: on the fly")
    data.add_argument("--views", type=int, default=1, help="of each picture, by chance, in the cache (%(default)s)")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="a card or a run folder to go on with; default: a small untrained one")
    model.add_argument("--vae", default="kl-vae-emoji-tiny", help="without --model: a name, or a folder (%(default)s)")
    model.add_argument("--text", default="clip-emoji-tiny", help="a CLIP whose text tower is read (%(default)s)")
    model.add_argument(
        "--widths", type=int, nargs="+", default=[96, 160, 224], metavar="CHANNELS", help="of levels (96 160 224)"
    )
    model.add_argument("--blocks", type=int, default=1, help="residual blocks per level (%(default)s)")
    model.add_argument("--attention", type=int, nargs="*", default=[1, 2], metavar="LEVEL", help="with it (1 2)")
    model.add_argument("--heads", type=int, default=4, help="of attention (%(default)s)")
    model.add_argument("--groups", type=int, default=16, help="of channels in norms; published 32 (%(default)s)")
    how = parser.add_argument_group("what it learns")
    how.add_argument("--prediction", default="v", choices=("epsilon", "v", "sample"), help="of a new one (%(default)s)")
    how.add_argument("--zero-snr", action="store_true", help="nothing but noise at the last timestep, of a new one")
    how.add_argument("--caption-dropout", type=float, default=0.1, help="captions left out (%(default)s)")
    how.add_argument("--min-snr", type=float, default=5.0, help="signal to noise counts up to it; 0: off (%(default)s)")
    how.add_argument("--noise-offset", type=float, default=0.0, help="of whole channels, as 0.05 (%(default)s)")
    add_options(
        parser, batch_size=64, lr=1e-3, weight_decay=1e-2, warm_up=0.05, ema=0.999,
        run_folder=Path("runs/stable_diffusion"),
    )  # fmt: skip
    return parser.parse_args(argv)


def build(args: argparse.Namespace, trainer: Trainer) -> StableDiffusion:
    """The model to train, its UNet in pieces under ZeRO-3. The tokenizer's files go to the run folder: the weights are
    useless without them."""
    args.run_folder.mkdir(parents=True, exist_ok=True)
    how = {name: getattr(args, name) for name in ("caption_dropout", "min_snr", "noise_offset")}
    if args.model:
        loader = find("text2img", "stable-diffusion", args.model)
        keep_tokenizer(loader, args.run_folder)
        model = loader.get_model()
        model.config = replace(model.config, **how)
        return model
    matching = find("txt_img_matching", "clip", args.text)
    keep_tokenizer(matching, args.run_folder)
    clip, tokenizer = matching.get_model(), matching.get_tokenizer()
    vae = find("img_tokenizing", "kl-vae", args.vae).get_model()
    text = build_text(clip.config.text)
    text.load_state_dict({name: clip.text.state_dict()[name] for name in text.state_dict()})
    sizes = UNetConfig(
        channels=vae.channels, out=vae.channels, widths=tuple(args.widths), blocks=args.blocks,
        attention=tuple(args.attention), heads=(args.heads,) * len(args.widths), context=text.width,
        groups=args.groups, linear=True, size=vae.grid,
    )  # fmt: skip
    config = StableDiffusionConfig(
        text=clip.config.text, unet=sizes, vae=vae.config,
        noise=NoiseConfig(prediction=args.prediction, zero_snr=args.zero_snr),
        start=tokenizer.start_token, end=tokenizer.end_token, pad=tokenizer.pad, window=clip.config.text.context,
        guidance=3.0, sampler="dpm++2m", steps=20, **how,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    return StableDiffusion(config, text, trainer.build(lambda: UNet(sizes)), vae, tokenizer)


def keep_tokenizer(loader: AutoLoader, folder: Path) -> None:
    """Copies the tokenizer's files beside the weights to be."""
    for name, file in loader.tokenizer_files().items():
        if name in VOCABULARIES:
            weights.copy_file(file, folder / name)


def measure_scale(model: StableDiffusion, pictures: Dataset) -> None:
    """Gives a VAE that says nothing of its latents' scale the one of unit spread, as measured on the first pictures:
    what published ones call scale_by_std."""
    if model.vae.scale != 1:
        return
    some = Subset(pictures, range(min(len(pictures), MEASURED)))
    moments = encode_dataset(some, {"moments": model.vae.moments}, progress=distributed.rank() == 0)["moments"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scale = 1 / float(sample_moments(moments, torch.randn_like(moments.chunk(2, 1)[0])).std())
    model.vae.config = replace(model.vae.config, scale=scale)
    model.config = replace(model.config, vae=model.vae.config)


def open_data(args: argparse.Namespace, model: StableDiffusion) -> tuple[Dataset, Dataset | None]:
    """Training pairs, with moments instead of pictures if that was asked for; and held-out pairs to measure on (None
    for pairs of one's own)."""
    size = model.image_size
    crop, tokenizer = dalle_train_transform(size), model.tokenizer
    if args.pairs:
        pairs = partial(CsvDataset, args.pairs, args.pictures, sep=None)
        measure_scale(model, pairs(crop, None))
        return with_moments(args, model, pairs, crop) or pairs(crop, tokenizer), None
    pairs = partial(open_dataset, "emoji", language=args.language)
    measure_scale(model, pairs("train", crop, None))
    train = with_moments(args, model, partial(pairs, "train"), crop) or pairs("train", crop, tokenizer)
    held_out = open_dataset("emoji", "test", unit_transform(size), tokenizer)
    return train, Subset(held_out, range(0, len(held_out), len(held_out) // HELD_OUT))


def with_moments(args: argparse.Namespace, model: StableDiffusion, pairs: Callable, crop: Callable) -> Dataset | None:
    """The captions of pairs with the moments of their pictures; None if pictures were asked for."""
    if not args.cache:
        return None
    torch.manual_seed(args.seed)  # of the views: the same on every rank, and when it goes on
    pictures = ConcatDataset([pairs(crop, None)] * args.views)
    found = encode_dataset(pictures, {"moments": model.vae.moments}, progress=distributed.rank() == 0)
    texts = ConcatDataset([Texts(pairs(None, model.tokenizer))] * args.views)
    return StackDataset(moments=found["moments"], text=texts)


class Texts(Dataset):
    """The captions of pairs."""

    def __init__(self, pairs: Dataset) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.pairs[i][1]


@torch.no_grad()
def measure(dataset: Dataset, model: StableDiffusion) -> dict[str, float]:
    """The loss on held-out pairs, always with the same noise."""
    device, loss = next(model.parameters()).device, 0.0
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for batch in DataLoader(dataset, batch_size=64, collate_fn=collate_fn):
            found = model(text=batch["text"].to(device), image=batch["image"].to(device))["loss"]
            loss += float(found) * len(batch["text"]) / len(dataset)
    return {"loss": loss}


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    words = trainer_words(args)
    if not args.steps and not args.epochs:
        words["epochs"] = 10
    trainer = Trainer(
        experiment_name="stable_diffusion",
        about={name: str(getattr(args, name)) for name in CHANGES_THE_DATA_OR_THE_MODEL},
        best="loss",
        **words,
    )
    model = build(args, trainer)
    train, held_out = open_data(args, model)

    def evaluate(shown: StableDiffusion) -> dict[str, float]:
        draw_samples(shown, args.run_folder / f"samples/{trainer.step:06}.png")
        return measure(held_out, shown) if held_out else {}

    trainer.train(model, train_dataset=train, collate_fn=None if args.cache else collate_fn, evaluate=evaluate)


if __name__ == "__main__":
    main()
