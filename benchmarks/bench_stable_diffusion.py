"""Stable Diffusion beside diffusers, with the same weights, in turns, in one run. Above 1 zoo is better.

    python benchmarks/bench_stable_diffusion.py                  # the sizes of Stable Diffusion 1.5, 256 pixels
    python benchmarks/bench_stable_diffusion.py --quick          # narrow ones
    python benchmarks/bench_stable_diffusion.py --part unet --dtype bf16 --rounds 5

unet: one guided call of the UNet, two rows of latents. Ours with what drawing does for it: keys and values of the
context computed before, weights laid out once.
picture: text's context to pixels in 20 steps of DDIM with guidance, VAE included, against the pipeline.
step: a training step with the VAE's moments known before against one that computes them.

Loading, and the memory of training, are in bench_stable_diffusion_script.py. diffusers must be installed beside zoo.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

import torch
from bench_vqgan import OURS_TO_DIFFUSERS, in_turn, report
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn

from zoo import weights
from zoo.blocks.packed import packed
from zoo.generation.samplers import SamplerConfig
from zoo.models.clip import TextConfig
from zoo.models.kl_vae import KlVae, KlVaeConfig
from zoo.models.latent_drawing import Drawing, Sketch, draw
from zoo.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from zoo.models.unet import UNetConfig

SIDE, STEPS, GUIDANCE = 256, 20, 7.5
QUICK = {"unet": (64, 128, 256, 256), "vae": (32, 64, 64, 64)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Pair:
    """The same random weights in diffusers' networks and in ours."""

    def __init__(self, quick: bool, dtype: torch.dtype):
        torch.manual_seed(0)
        unet, vae = UNetConfig(), KlVaeConfig()
        if quick:
            unet, vae = UNetConfig(widths=QUICK["unet"]), KlVaeConfig(widths=QUICK["vae"])
        self.unet = UNet2DConditionModel(
            sample_size=64, block_out_channels=unet.widths, cross_attention_dim=768, attention_head_dim=8
        )
        self.vae = AutoencoderKL(
            block_out_channels=vae.widths,
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2,
            latent_channels=4,
        )
        self.unet, self.vae = self.unet.to(dtype).eval(), self.vae.to(dtype).eval()
        with weights.blank():
            text = TextConfig(width=768, depth=1, heads=12)  # contexts are given: it is never asked
            model = StableDiffusion(StableDiffusionConfig(text=text, unet=unet, vae=vae))
        own, theirs = model.unet.state_dict(), self.unet.state_dict()
        weights.load(model.unet, {name: w.view_as(own[name]) for name, w in theirs.items()})
        weights.load(model.vae, renamed(model.vae, self.vae))
        self.model = model.to(dtype).eval()
        self.contexts = torch.randn(2, 77, 768, dtype=dtype)
        self.dtype = dtype


def renamed(ours: KlVae, theirs: nn.Module) -> dict[str, torch.Tensor]:
    """diffusers' VAE by our names."""
    state, found = theirs.state_dict(), {}
    for name, tensor in ours.state_dict().items():
        other = re.sub(r"^decoder\.up\.(\d)", lambda level: f"decoder.up.{3 - int(level[1])}", name)
        for pattern, new in OURS_TO_DIFFUSERS:
            other = re.sub(pattern, new, other)
        found[name] = state[other].view_as(tensor)
    return found


@torch.inference_mode()
def unet(args: argparse.Namespace, pair: Pair) -> None:
    latents, timestep = torch.randn(2, 4, SIDE // 8, SIDE // 8, dtype=pair.dtype), torch.tensor(500)
    known = pair.model.unet.keys_values(pair.contexts)
    theirs = lambda: pair.unet(latents, timestep, pair.contexts).sample  # noqa: E731
    ours = lambda: pair.model.unet(latents, timestep, known)  # noqa: E731
    with packed(pair.model.unet):
        away = (theirs() - ours()).abs().max()
        report("unet", *in_turn((ours, theirs), args.rounds))
    print(f"            outputs are {away:.0e} apart at most")


@torch.inference_mode()
def picture(args: argparse.Namespace, pair: Pair) -> None:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        pair.vae, None, None, pair.unet, scheduler, None, None, requires_safety_checker=False
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    without, context = pair.contexts.split(1)
    how = Drawing(sampler=SamplerConfig(sampler="ddim", steps=STEPS), guidance=GUIDANCE, progress=False)

    def theirs() -> torch.Tensor:
        return pipeline(
            prompt_embeds=context, negative_prompt_embeds=without, height=SIDE, width=SIDE,
            num_inference_steps=STEPS, guidance_scale=GUIDANCE,
            generator=torch.Generator().manual_seed(0), output_type="pt",
        ).images  # fmt: skip

    def ours() -> torch.Tensor:
        return draw(pair.model, context, without, [0], how, Sketch(size=(SIDE, SIDE)))

    away = (theirs() - ours()).abs().max()
    report("picture", *in_turn((ours, theirs), args.rounds))
    print(f"            pixels are {away:.0e} apart at most")


def step(args: argparse.Namespace, pair: Pair) -> None:
    model = pair.model.train()
    image, context = torch.rand(2, 3, SIDE, SIDE, dtype=pair.dtype), pair.contexts
    with torch.no_grad():
        moments = model.vae.moments(image)
    model.config = StableDiffusionConfig(**{**vars(model.config), "caption_dropout": 0.0})

    def once(**given: torch.Tensor) -> Callable:
        def run() -> None:
            model(context=context, **given)["loss"].backward()
            model.zero_grad()

        return run

    report("step", *in_turn((once(moments=moments), once(image=image)), args.rounds))


PARTS = {"unet": unet, "picture": picture, "step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="(default: all)")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="(default: both)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    for dtype in args.dtype or DTYPES:
        pair = Pair(args.quick, DTYPES[dtype])
        print(f"{dtype}, {sum(p.numel() for p in pair.unet.parameters()) / 1e6:.0f} M parameters in the UNet")
        for part in args.part or PARTS:
            PARTS[part](args, pair)


if __name__ == "__main__":
    main()
