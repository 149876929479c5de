"""VQGAN's network, quantizer and training step, each beside its peer, in turns, in one run. Above 1 zoo is better.

    python benchmarks/bench_vqgan.py                     # taming's f16 at 256 pixels
    python benchmarks/bench_vqgan.py --quick             # narrow, at 64 pixels
    python benchmarks/bench_vqgan.py --part network --part quantizer --part step --rounds 3 --batch-size 1

network: pictures to codes and back, against diffusers' VQModel with the same weights. zoo does not need diffusers:
without it this part is left out.
quantizer: what finding the nearest of 16,384 rows takes, in memory and time, against argmin(cdist), which is how
diffusers and CLIP-GEN's release do it; latents of the grids of 16 x 16 of some pictures.
step: both updates of adversarial training, by AdversarialTrainer, with all that a Trainer does besides, against a loop
by hand in taming's way: for the adaptive weight, reconstruction and verdict each go back through LPIPS or discriminator
to the last layer, and then both once more through everything. LPIPS has random weights. taming draws the picture anew
for the discriminator, which the loop by hand does not.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import statistics
import time
from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from bench_dalle import fastest
from torch import Tensor, nn
from torch.profiler import profile
from torch.utils.data import Dataset, default_collate

from zoo.blocks.quantize import VectorQuantizer
from zoo.metrics.lpips import Lpips
from zoo.models.patch_discriminator import PatchDiscriminator
from zoo.models.vqgan import Vqgan, VqganConfig
from zoo.training.adversarial import AdversarialTrainer, Adversary

LR, BETAS, ADVERSARIAL = 1e-4, (0.5, 0.9), 0.8
OURS_TO_DIFFUSERS = (
    (r"\.(down|up)\.(\d+)\.", r".\1_blocks.\2."),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.mid\.block_([12])\.", lambda found: f".mid_block.resnets.{int(found[1]) - 1}."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"\.proj_out\.", ".to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
    (r"\.norm_out\.", ".conv_norm_out."),
)


def sizes(args: argparse.Namespace) -> VqganConfig:
    return VqganConfig(size=64, widths=(32, 32, 32, 64), blocks=1, attention=(3,)) if args.quick else VqganConfig()


# --- network ---------------------------------------------------------------------------------------------------------
def network(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("diffusers") is None:
        print("left out: it needs diffusers beside zoo, which `pip install diffusers` brings")
        return
    torch.manual_seed(0)
    ours = Vqgan(sizes(args)).eval()
    nn.init.normal_(ours.quantize.embedding.weight)  # a fresh book's rows lie too close to compare codes
    theirs = diffusers_twin(ours)
    image = torch.rand(args.batch_size, 3, ours.image_size, ours.image_size)
    pixels, codes = 2 * image - 1, ours.encode(image)
    shape = (*codes.shape, ours.config.code_width)
    equal = (theirs.quantize(theirs.encode(pixels).latents)[2][2].view_as(codes) == codes).float().mean()
    drawn = theirs.decode(codes.flatten(), force_not_quantize=True, shape=shape).sample
    away = (drawn.clamp(-1, 1) / 2 + 0.5 - ours.decode(codes)).abs().max()
    print(f"the same weights: {equal:.2%} of codes are the same, pictures differ by {away:.1e} at most")
    for name, calls in {
        "encode": (lambda: ours.encode(image), lambda: theirs.quantize(theirs.encode(pixels).latents)[2][2]),
        "decode": (
            lambda: ours.decode(codes),
            lambda: theirs.decode(codes.flatten(), force_not_quantize=True, shape=shape).sample,
        ),
    }.items():
        report(name, *in_turn(calls, args.rounds))


def diffusers_twin(ours: Vqgan) -> nn.Module:
    """diffusers' VQModel of the same sizes and weights; attention at the lowest level only."""
    from diffusers import VQModel

    config, levels = ours.config, len(ours.config.widths)
    theirs = VQModel(
        down_block_types=(*["DownEncoderBlock2D"] * (levels - 1), "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * (levels - 1)),
        block_out_channels=config.widths,
        layers_per_block=config.blocks,
        latent_channels=config.latent,
        num_vq_embeddings=config.vocab,
        vq_embed_dim=config.code_width,
        lookup_from_codebook=True,  # so that `decode` takes codes
    ).eval()
    state = {}
    for name, tensor in ours.state_dict().items():
        # Their decoder counts levels from the lowest resolution.
        name = re.sub(r"\.up\.(\d+)\.", lambda found: f".up.{levels - 1 - int(found[1])}.", name)
        for pattern, theirs_is in OURS_TO_DIFFUSERS:
            name = re.sub(pattern, theirs_is, name)
        linear = ".to_" in name and tensor.ndim == 4
        state[name] = tensor.flatten(1) if linear else tensor
    theirs.load_state_dict(state)
    return theirs


def in_turn(calls: tuple[Callable[[], object], Callable[[], object]], rounds: int) -> tuple[float, float]:
    """Milliseconds of ours and of theirs."""
    times = fastest({"ours": calls[0], "theirs": calls[1]}, rounds)
    return 1e3 * times["ours"], 1e3 * times["theirs"]


def report(name: str, ours: float, theirs: float, unit: str = "ms") -> None:
    print(f"{name:10}  zoo {ours:9.1f} {unit}  peer {theirs:9.1f} {unit}  {theirs / ours:6.2f}", flush=True)


# --- quantizer -------------------------------------------------------------------------------------------------------
def quantizer(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    ours = VectorQuantizer(16384, 256)
    book = nn.init.normal_(ours.embedding.weight)

    def by_cdist(latents: Tensor) -> Tensor:
        points = latents.movedim(1, -1).flatten(0, -2)  # (N, D)
        return torch.cdist(points, book).argmin(1).view(len(latents), *latents.shape[2:])

    for pictures in (1, 20) if args.quick else (8, 64):
        latents = torch.randn(pictures, 256, 16, 16)
        calls = (lambda x=latents: ours.encode(x), lambda x=latents: by_cdist(x))
        equal = (calls[0]() == calls[1]()).float().mean()
        print(f"latents of {pictures} pictures, {equal:.2%} of codes are the same")
        report("memory", *(most_held(call) / 1e6 for call in calls), "MB")
        report("time", *in_turn(calls, args.rounds))


def most_held(call: Callable[[], object]) -> int:
    """The most bytes that torch held at once during the call, of what it took in it."""
    with profile(profile_memory=True) as profiled:
        call()
    taken = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, most = 0, 0
    for event in sorted(taken, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


# --- step ------------------------------------------------------------------------------------------------------------
class Pictures(Dataset):
    """Noise, always the same."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"image": torch.rand(3, self.size, self.size, generator=torch.Generator().manual_seed(i))}


class InTurn:
    """The trainer's collate_fn: called before each of its steps, it first makes one by hand on the same batch. What
    passes until it is called again is the trainer's whole step."""

    def __init__(self, hand: Callable[[Tensor], None], same: Callable[[], float]):
        self.hand, self.same, self.left, self.away = hand, same, None, 0.0
        self.seconds: dict[str, list[float]] = {"hand": [], "trainer": []}

    def __call__(self, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.left is not None:
            self.seconds["trainer"].append(time.perf_counter() - self.left)
        if len(self.seconds["trainer"]) == 1:
            self.away = self.same()
        batch = default_collate(samples)
        start = time.perf_counter()
        self.hand(batch["image"])
        self.left = time.perf_counter()
        self.seconds["hand"].append(self.left - start)
        return batch


class TamingsWay:
    """An update of the generator and one of the discriminator, as VQLPIPSWithDiscriminator and its trainer make them
    (CompVis/taming-transformers), but that the picture is drawn once."""

    def __init__(self, model: Vqgan, discriminator: PatchDiscriminator, lpips: Lpips):
        self.model, self.discriminator, self.lpips = model.train(), discriminator.train(), lpips
        self.optimizers = [
            torch.optim.AdamW(part.parameters(), LR, BETAS, weight_decay=0.0, fused=True)
            for part in (model, discriminator)
        ]

    def __call__(self, image: Tensor) -> None:
        found = self.model(image)
        drawn, target = found["image"], found["target"]
        loss = found["loss"] + self.lpips(image, (drawn + 1) / 2).mean()
        verdict = -self.discriminator(drawn).mean()
        pulled, pushed = (
            torch.autograd.grad(part, self.model.last_layer, retain_graph=True)[0].norm() for part in (loss, verdict)
        )
        weight = (pulled / (pushed + 1e-4)).clamp(0, 1e4)
        (loss + ADVERSARIAL * weight * verdict).backward(inputs=list(self.model.parameters()))
        real, false = self.discriminator(target), self.discriminator(drawn.detach())
        ((F.relu(1 - real).mean() + F.relu(1 + false).mean()) / 2).backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()


def step(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    ours, discriminator, lpips = Vqgan(sizes(args)), PatchDiscriminator(), Lpips()
    for head in lpips.heads:
        nn.init.uniform_(head)
    theirs = deepcopy(ours)
    hand = TamingsWay(theirs, deepcopy(discriminator), lpips.eval())

    def away() -> float:
        """Of both models' weights, the difference, over how far Adam's first step takes each."""
        pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
        squares = sum((a - b).detach().square().sum() for a, b in pairs)
        return float((squares / sum(a.numel() for a, _ in pairs)).sqrt() / LR)

    steps = args.rounds + 2  # the first warms up, the last is not seen to end
    turns = InTurn(hand, away)
    trainer = AdversarialTrainer(
        discriminator=discriminator,
        perceptual=lpips,
        adversary=Adversary(adversarial=ADVERSARIAL, warm_up=0.0, rest=0.0),
        **dict(steps=steps, batch_size=args.batch_size, lr=LR, betas=BETAS, weight_decay=0.0, clip_grad=0.0),
        **dict(lr_decay="constant", warm_up=0, progress=False, pytorch_device="cpu"),
    )
    with torch.enable_grad():
        trainer.train(ours, train_dataset=Pictures(steps * args.batch_size, ours.image_size), collate_fn=turns)
    print(f"after one step of both, weights differ by {turns.away:.1%} of that step (root mean squares)")
    mine, other = turns.seconds["trainer"][1:], turns.seconds["hand"][1:-1]
    report("fastest", 1e3 * min(mine), 1e3 * min(other))
    print(f"{'median of the pairs':49}{statistics.median(b / a for a, b in zip(mine, other, strict=True)):6.2f}")


PARTS = {"network": network, "quantizer": quantizer, "step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="narrow, at 64 pixels")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=PARTS, action="append")
    args = parser.parse_args()
    config = sizes(args)
    for part in args.part or PARTS:
        print(f"\n{part}: {config.size} pixels, widths {config.widths}, {torch.get_num_threads()} threads, fp32")
        with torch.no_grad():
            PARTS[part](args)


if __name__ == "__main__":
    main()
