"""Stable Diffusion beside diffusers as scripts, each in a process of its own, in turn. Above 1 zoo is better.

    python benchmarks/bench_stable_diffusion_script.py                  # the sizes of Stable Diffusion 1.5
    python benchmarks/bench_stable_diffusion_script.py --quick          # narrow ones
    python benchmarks/bench_stable_diffusion_script.py --part train --batch-size 2

load: a folder of diffusers, from the disk's cache, with its tokenizer, until each page of the weights was read. "load"
is from after the imports, "script" from the start of Python; "memory" is the peak over what the imports take.
train: two steps in fp32 with AdamW at 256 pixels, the peak likewise. Theirs is the loop of diffusers' example
train_text_to_image.py, without its average; ours is `Trainer` on the same pictures, and ("cached") on moments and
contexts that were computed before.

Needs Linux, which says what a process holds, and diffusers beside zoo.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time

import torch
from bench_vqgan import report
from torch import nn

from zoo.commands.export import save_diffusers
from zoo.models.clip import TextConfig
from zoo.models.kl_vae import KlVaeConfig
from zoo.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from zoo.models.unet import UNetConfig
from zoo.tokenizers import ClipTokenizer

SIDE = 256
SCRIPTS = {}  # what each process runs between the imports and the figures; `parts` are its networks
IMPORTS = {
    "zoo": "import zoo.models.stable_diffusion; from zoo import AutoLoader, Trainer",
    "peer": "from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel",
}
SCRIPTS["load", "zoo"] = """
parts = [AutoLoader("text2img", "stable-diffusion", weights=folder).get_model()]
"""
SCRIPTS["load", "peer"] = """
pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
parts = [pipeline.unet, pipeline.vae, pipeline.text_encoder]
"""
SCRIPTS["train", "zoo"] = """
model = AutoLoader("text2img", "stable-diffusion", weights=folder).get_model()
data = [{"image": torch.rand(3, side, side), "text": torch.arange(77)} for _ in range(batch)]
Trainer(steps=2, batch_size=batch, lr=1e-4, progress=False).train(model, train_dataset=data)
parts = []
"""
SCRIPTS["train", "cached"] = SCRIPTS["train", "zoo"].replace(
    '"image": torch.rand(3, side, side), "text": torch.arange(77)',
    '"moments": torch.rand(8, side // 8, side // 8), "context": torch.rand(77, 768)',
)
SCRIPTS["train", "peer"] = """
from transformers import CLIPTextModel
vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").requires_grad_(False)
text = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder").requires_grad_(False)
unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").train()
scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
for _ in range(2):
    pictures, tokens = torch.rand(batch, 3, side, side), torch.arange(77).expand(batch, -1)
    latents = vae.encode(pictures).latent_dist.sample() * vae.config.scaling_factor
    noise, timesteps = torch.randn_like(latents), torch.randint(1000, (batch,))
    found = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, text(tokens)[0]).sample
    torch.nn.functional.mse_loss(found, noise).backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
parts = []
"""
AROUND = """
import json, re, sys, time
folder, side, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
import torch
{imports}
def mib(what):
    return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before, start = mib("VmRSS"), time.perf_counter()
{script}
read = sum(float(p.detach().view(-1)[::512].sum()) for part in parts for p in part.parameters())
print(json.dumps({{"load": time.perf_counter() - start, "memory": mib("VmHWM") - before}}))
"""


def run(part: str, who: str, folder: str, batch: int) -> dict[str, float]:
    """The figures of one process: seconds, and MiB."""
    code = AROUND.format(imports=IMPORTS["peer" if who == "peer" else "zoo"], script=SCRIPTS[part, who])
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, folder, str(SIDE), str(batch)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return {**json.loads(done.stdout.splitlines()[-1]), "script": time.perf_counter() - start}


def write(folder: str, quick: bool) -> float:
    """A folder of diffusers with random weights; gives back their MiB."""
    torch.manual_seed(0)
    config = StableDiffusionConfig()
    if quick:
        config = StableDiffusionConfig(
            text=TextConfig(width=768, depth=1, heads=12),
            unet=UNetConfig(widths=(64, 128, 256, 256)),
            vae=KlVaeConfig(widths=(32, 64, 64, 64)),
        )
    model = StableDiffusion(config, tokenizer=ClipTokenizer(pad=config.pad))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    save_diffusers(model, folder)
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("load", "train"), action="append", help="(default: both)")
    parser.add_argument("--rounds", type=int, default=3, help="of loading, of which the fastest counts")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{write(folder, args.quick):.0f} MiB of weights")
        for part in args.part or ("load", "train"):
            rounds = range(args.rounds if part == "load" else 1)
            people = [who for name, who in SCRIPTS if name == part]
            # In turn: what else the machine does then hurts all of them.
            figures = [{who: run(part, who, folder, args.batch_size) for who in people} for _ in rounds]
            best = {who: {n: min(f[who][n] for f in figures) for n in figures[0][who]} for who in people}
            for name in ("load", "script") if part == "load" else ():
                report(name, best["zoo"][name], best["peer"][name], "s")
            for who in people[:-1] if part == "train" else ("zoo",):
                report("memory" if who == "zoo" else who, best[who]["memory"], best["peer"]["memory"], "MiB")


if __name__ == "__main__":
    main()
