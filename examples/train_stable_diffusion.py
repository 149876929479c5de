"""Trains a Stable Diffusion on pairs of pictures and captions, over a VAE and a text tower that are trained already.

    python examples/train_stable_diffusion.py                       # from nothing, on the packaged emoji
    deepspeed --hostfile hostfile examples/train_stable_diffusion.py            # or zoo launch, torchrun, --num-gpus 2
    python examples/train_stable_diffusion.py --model stable-diffusion-v1-5 --pairs pairs.tsv --pictures img \\
        --lr 1e-5 --precision bf16 --checkpoint-activations         # goes on with published weights
    python examples/train_stable_diffusion.py --model stable-diffusion-v1-5 --pairs pairs.tsv --lora 16 --lr 1e-4
    python examples/train_stable_diffusion.py --model stable-diffusion-v1-5 --instance my_dog --train-text \\
        --instance-prompt "a photo of sks dog" --prior dogs --prior-prompt "a photo of a dog" --lr 2e-6 \\
        --caption-dropout 0 --min-snr 0 --steps 800                 # DreamBooth (Ruiz et al. 2023)
    zoo launch --hostfile hostfile examples/train_stable_diffusion.py @examples/stable_diffusion_cc256.txt \\
        --pairs cc3m.tsv --pictures cc3m --batch-size 32            # Conceptual Captions on 4 machines of 8 GPUs; on 8,
                                                                    # 16, 32 of them batches of 16, 8, 4

A tenth of the captions are left out, so that guidance works. Latents are computed on the fly, once (--cache once), or
by `zoo data encode` (--cache FILE). At each evaluation the run folder gets samples/STEP.png, drawn by all ranks with
the model that is trained. Start the same command again and it goes on. The run folder is loaded by
AutoLoader("text2img", "stable-diffusion", weights=FOLDER); with --lora it also gets lora.safetensors, as diffusers
reads it, which the weights beside it hold already. Options may stand in a file, as in the last command; of two, the
later holds.

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
from zoo.blocks.lora import add_lora
from zoo.commands.model_options import find, vocabulary_files
from zoo.commands.samples import draw_samples
from zoo.converters.lora import split
from zoo.data import CsvDataset, FolderDataset, collate_fn, dalle_train_transform, open_dataset, unit_transform
from zoo.data.buckets import BucketDataset, bucket_sizes
from zoo.data.codes import Texts, check_contexts, check_moments, encode_dataset
from zoo.data.dreambooth import Captioned, DreamBooth, dreambooth_collate
from zoo.errors import SettingsError
from zoo.generation.noise_schedule import NoiseConfig
from zoo.models.kl_vae import KlVae, sample_moments
from zoo.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from zoo.models.text_encoder import ClipTextEncoder, text_of
from zoo.models.unet import UNet, UNetConfig
from zoo.models.vq_latents import VqLatents, latents_of
from zoo.models.vqgan import Vqgan
from zoo.training.options import add_options, trainer_words

HELD_OUT, MEASURED = 400, 1000  # pairs that each evaluation looks at; and pictures that the scale is measured on
CHANGES_THE_DATA_OR_THE_MODEL = (
    *("model", "vae", "text", "pairs", "pictures", "language", "cache", "views", "widths", "blocks", "attention"),
    *("heads", "groups", "prediction", "zero_snr", "caption_dropout", "min_snr", "noise_offset"),
)
CHANGES_IT_WHERE_GIVEN = (
    *("lora", "train_text", "buckets", "instance", "instance_prompt", "prior", "prior_prompt", "prior_weight"),
    *("size", "head_width", "beta_start", "beta_end"),
)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="train_stable_diffusion.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        fromfile_prefix_chars="@",
    )  # fmt: skip
    parser.convert_arg_line_to_args = lambda line: line.partition("#")[0].split()
    add_data_options(parser)
    add_model_options(parser)
    how = parser.add_argument_group("what it learns")
    how.add_argument("--prediction", default="v", choices=("epsilon", "v", "sample"), help="of a new one (%(default)s)")
    how.add_argument("--zero-snr", action="store_true", help="nothing but noise at the last timestep, of a new one")
    how.add_argument("--beta-start", type=float, help="noise of the first timestep, of a new one (0.00085)")
    how.add_argument("--beta-end", type=float, help="and of the last (0.012)")
    how.add_argument("--caption-dropout", type=float, default=0.1, help="captions left out (%(default)s)")
    how.add_argument("--min-snr", type=float, default=5.0, help="signal to noise counts up to it; 0: off (%(default)s)")
    how.add_argument("--noise-offset", type=float, default=0.0, help="of whole channels, as 0.05 (%(default)s)")
    how.add_argument("--lora", type=int, metavar="RANK", help="train so much beside the UNet's attention, of --model")
    how.add_argument("--train-text", action="store_true", help="the text tower too; with --lora so much beside its own")
    add_options(
        parser, batch_size=64, lr=1e-3, weight_decay=1e-2, warm_up=0.05, ema=0.999,
        run_folder=Path("runs/stable_diffusion"),
    )  # fmt: skip
    args = parser.parse_args(argv)
    check(args)
    return args


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """What it learns from."""
    data = parser.add_argument_group("data")
    data.add_argument("--pairs", type=Path, help="tsv or csv of title and filepath; default: packaged emoji")
    data.add_argument("--pictures", type=Path, help="folder that the filepaths of --pairs start from")
    data.add_argument("--language", default="both", choices=("en", "zh", "both"), help="of the emoji captions")
    data.add_argument("--cache", help="'once': the VAE's moments are computed before training; or their file")
    data.add_argument("--views", type=int, default=1, help="of each picture, by chance, in the cache (%(default)s)")
    data.add_argument("--buckets", action="store_true", help="pictures keep their aspect ratio, of one area")
    data.add_argument("--instance", type=Path, metavar="FOLDER", help="DreamBooth: a few pictures of one thing")
    data.add_argument("--instance-prompt", metavar="TEXT", help="their caption, with a rare word for the thing")
    data.add_argument("--prior", type=Path, metavar="FOLDER", help="pictures of its kind, such as the model drew")
    data.add_argument("--prior-prompt", metavar="TEXT", help="their caption")
    data.add_argument("--prior-weight", type=float, help="of their loss (1)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What learns."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="a card or a run folder to go on with; default: a small untrained one")
    model.add_argument(
        "--vae",
        default="kl-vae-emoji-tiny",
        help="without --model: a KL-VAE or VQGAN, a name or a folder (%(default)s)",
    )
    model.add_argument("--size", type=int, help="side of a picture in pixels; default: the VAE's, or the model's")
    model.add_argument("--text", default="clip-emoji-tiny", help="a CLIP whose text tower is read (%(default)s)")
    model.add_argument(
        "--widths", type=int, nargs="+", default=[64, 128, 192], metavar="CHANNELS", help="of levels (64 128 192)"
    )
    model.add_argument("--blocks", type=int, default=1, help="residual blocks per level (%(default)s)")
    model.add_argument("--attention", type=int, nargs="*", default=[1, 2], metavar="LEVEL", help="with it (1 2)")
    model.add_argument("--heads", type=int, default=4, help="of attention (%(default)s)")
    model.add_argument("--head-width", type=int, help="of attention, in place of --heads: its channels by so many")
    model.add_argument("--groups", type=int, default=16, help="of channels in norms; published 32 (%(default)s)")


def check(args: argparse.Namespace) -> None:
    """Raises SettingsError for options that contradict each other."""
    if args.lora and not args.model:
        raise SettingsError("--lora learns beside a model that knows already: give --model")
    if (args.instance is None) != (args.instance_prompt is None) or (args.prior is None) != (args.prior_prompt is None):
        raise SettingsError("--instance and --prior are folders of pictures: give their --...-prompt too")
    if args.prior and not args.instance:
        raise SettingsError("--prior stands beside --instance: give that too")
    if args.cache and (args.buckets or args.instance):
        raise SettingsError("--cache is of a whole data set, at one size: not with --buckets or --instance")
    if args.buckets and args.instance:
        raise SettingsError("--buckets is for --pairs or a data set, not for --instance")


def source(args: argparse.Namespace) -> AutoLoader:
    """What gives the model its tokenizer: the model to go on with, or the CLIP whose text tower a new one reads."""
    if args.model:
        return find("text2img", "stable-diffusion", args.model)
    return find("txt_img_matching", "clip", args.text)


def build(args: argparse.Namespace, trainer: Trainer, loader: AutoLoader) -> StableDiffusion:
    """The model to train, its UNet in pieces under ZeRO-3."""
    how = {name: getattr(args, name) for name in ("caption_dropout", "min_snr", "noise_offset")}
    if args.model:
        model = loader.get_model()
        model.config = replace(model.config, **how)
        if args.lora:
            put_lora(model, args)
            return model
    else:
        model = build_new(args, trainer, loader, how)
    model.text.requires_grad_(args.train_text)
    return model


def put_lora(model: StableDiffusion, args: argparse.Namespace) -> None:
    """LoRA at the UNet's attention, and at the text tower's if that is trained too. Raises SettingsError."""
    torch.manual_seed(args.seed)
    add_lora(model.unet, ("to_q", "to_k", "to_v", "to_out.0"), args.lora)
    if args.train_text:
        if not isinstance(model.text, ClipTextEncoder):
            raise SettingsError("--lora with --train-text is for CLIP's text tower: leave --train-text out")
        add_lora(model.text, ("attention.qkv", "attention.out"), args.lora)


def build_new(
    args: argparse.Namespace, trainer: Trainer, matching: AutoLoader, how: dict[str, float]
) -> StableDiffusion:
    """One that knows nothing yet, over the parts that the options name."""
    clip, tokenizer = matching.get_model(), matching.get_tokenizer()
    vae, text = first_stage(args.vae), text_of(clip)
    heads = [w // args.head_width if args.head_width else args.heads for w in args.widths]
    noise = {name: getattr(args, name) for name in ("beta_start", "beta_end") if getattr(args, name)}
    sizes = UNetConfig(
        channels=vae.channels, out=vae.channels, widths=tuple(args.widths), blocks=args.blocks,
        attention=tuple(args.attention), heads=tuple(heads), context=text.width, groups=args.groups, linear=True,
        size=args.size // vae.factor if args.size else vae.grid,
    )  # fmt: skip
    config = StableDiffusionConfig(
        text=clip.config.text, unet=sizes, vae=vae.config,
        noise=NoiseConfig(prediction=args.prediction, zero_snr=args.zero_snr, **noise),
        start=tokenizer.start_token, end=tokenizer.end_token, pad=tokenizer.pad, window=clip.config.text.context,
        guidance=3.0, sampler="dpm++2m", steps=20, **how,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    return StableDiffusion(config, text, trainer.build(lambda: UNet(sizes)), vae, tokenizer)


def first_stage(name: str) -> KlVae | VqLatents:
    """The VAE of that name or folder; a VQGAN's latents are not quantised."""
    has_codes = Path(name).exists() and "vocab" in weights.read_config(name)
    found = find("img_tokenizing", "vqgan" if has_codes else "kl-vae", name).get_model()
    return latents_of(found) if isinstance(found, Vqgan) else found


def measure_scale(model: StableDiffusion, pictures: Dataset) -> None:
    """Gives a VAE that says nothing of its latents' scale the one of unit spread, as measured on the first pictures:
    what published ones call scale_by_std."""
    if model.vae.scale != 1 or not isinstance(model.vae, KlVae):
        return
    some = Subset(pictures, range(min(len(pictures), MEASURED)))
    moments = encode_dataset(some, {"moments": model.vae.moments}, progress=distributed.rank() == 0)["moments"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        scale = 1 / float(sample_moments(moments, torch.randn_like(moments.chunk(2, 1)[0])).std())
    model.vae.config = replace(model.vae.config, scale=scale)
    model.config = replace(model.config, vae=model.vae.config)


def open_data(args: argparse.Namespace, model: StableDiffusion) -> tuple[Dataset, Callable | None, Dataset | None]:
    """Training pairs, with moments instead of pictures if that was asked for, and what makes batches of them; and
    held-out pairs to measure on (None for pairs of one's own)."""
    size = args.size or model.image_size
    crop, tokenizer = dalle_train_transform(size), model.tokenizer
    if args.instance:
        return *dreambooth(args, crop, tokenizer), None
    if args.pairs:
        pairs, held_out = partial(CsvDataset, args.pairs, args.pictures, sep=None), None
    else:
        pairs = partial(open_dataset, "emoji", "train", language=args.language)
        held_out = open_dataset("emoji", "test", unit_transform(size), tokenizer)
        held_out = Subset(held_out, range(0, len(held_out), len(held_out) // HELD_OUT))
    measure_scale(model, pairs(crop, None))
    if args.cache == "once":
        return encoded(args, model, pairs, crop), None, held_out
    if args.cache:
        return from_file(args, model, pairs), None, held_out
    if args.buckets:
        sizes = bucket_sizes(size, 8 * model.vae.factor)
        quiet = distributed.rank() != 0
        return BucketDataset(pairs(None, tokenizer), sizes, args.workers, not quiet), collate_fn, held_out
    return pairs(crop, tokenizer), collate_fn, held_out


def encoded(args: argparse.Namespace, model: StableDiffusion, pairs: Callable, crop: Callable) -> Dataset:
    """The captions of pairs with the moments of their pictures, computed now."""
    torch.manual_seed(args.seed)  # of the views: the same on every rank, and when it goes on
    pictures = ConcatDataset([pairs(crop, None)] * args.views)
    found = encode_dataset(pictures, {"moments": model.vae.moments}, progress=distributed.rank() == 0)
    texts = ConcatDataset([Texts(pairs(None, model.tokenizer))] * args.views)
    return StackDataset(moments=found["moments"], text=texts)


def from_file(args: argparse.Namespace, model: StableDiffusion, pairs: Callable) -> Dataset:
    """The same from a file of `zoo data encode`; with the contexts of captions, if it has them and the text tower stays
    as it is. Raises DataError for a file of other pictures or by another model."""
    state, about = weights.read(args.cache), weights.read_config(args.cache)
    moments = check_moments(state, about, pairs(None, None), model.vae)
    language = None if args.pairs else args.language
    contexts = None if args.train_text else check_contexts(state, about, language, model.text)
    if contexts is not None:
        return StackDataset(moments=moments, context=contexts)
    return StackDataset(moments=moments, text=Texts(pairs(None, model.tokenizer)))


def dreambooth(args: argparse.Namespace, crop: Callable, tokenizer: object) -> tuple[Dataset, Callable]:
    """The pictures of one thing, beside those of its kind if there are any, and what makes batches of them."""

    def captioned(folder: Path, prompt: str) -> Dataset:
        return Captioned(FolderDataset(folder, crop, captions=False), tokenizer.tokenize_as_tensor([prompt])[0])

    instance = captioned(args.instance, args.instance_prompt)
    if not args.prior:
        return instance, collate_fn
    prior_weight = 1.0 if args.prior_weight is None else args.prior_weight
    return DreamBooth(instance, captioned(args.prior, args.prior_prompt)), partial(dreambooth_collate, prior_weight)


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


def merge_lora(folder: Path) -> None:
    """Writes what was trained as lora.safetensors, in PEFT's and diffusers' names, and adds it to the weights; does
    nothing where that was done."""
    state, lora = split(weights.read(folder / "model.safetensors"))
    if lora:
        weights.write(lora, folder / "lora.safetensors")
        weights.write(state, folder / "model.safetensors")


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    words = trainer_words(args)
    if not args.steps and not args.epochs:
        words["epochs"] = 10
    loader = source(args)
    trainer = Trainer(
        experiment_name="stable_diffusion",
        about={name: str(getattr(args, name)) for name in CHANGES_THE_DATA_OR_THE_MODEL}
        | {
            name: str(getattr(args, name))
            for name in CHANGES_IT_WHERE_GIVEN
            if getattr(args, name) not in (None, False)
        },
        best="loss",
        beside=vocabulary_files(loader),
        **words,
    )
    model = build(args, trainer, loader)
    train, collate, held_out = open_data(args, model)

    def evaluate(shown: StableDiffusion) -> dict[str, float]:
        draw_samples(shown, args.run_folder / f"samples/{trainer.step:06}.png")
        return measure(held_out, shown) if held_out else {}

    trainer.train(model, train_dataset=train, collate_fn=collate, evaluate=evaluate)
    if args.lora and distributed.rank() == 0:
        for folder in (args.run_folder, args.run_folder / "best"):
            if (folder / "model.safetensors").exists():
                merge_lora(folder)


if __name__ == "__main__":
    main()
