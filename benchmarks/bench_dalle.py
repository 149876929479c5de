"""DALL-E's sampling and training, each beside its peer, in turns, in one run.

python benchmarks/bench_dalle.py [--width 768 --depth 12 --rounds 3 --part sampling|position|training]

sampling: time per image token of the cached sparse and full decoding, against the same network without a cache, and
against transformers' `generate` for a GPT-2 of equal width, depth, heads and vocabularies (which computes the logits of
text tokens too), 64 text tokens and 256 or 1,024 image tokens, one or eight pictures.
position: what an image token costs early and late in the picture, sparse and full.
training: a step with the paper's patterns against dense causal attention, 1,280 tokens, and each one's peak memory.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from zoo.generation.tokens import Sampling, sample_tokens, uniforms
from zoo.models.dalle_decoding import Decoding
from zoo.models.dalle_transformer import DalleTransformer, TransformerConfig

TEXT = 64
PLAIN = Sampling()


def transformer(args: argparse.Namespace, grid: int, **words) -> DalleTransformer:
    torch.manual_seed(0)
    sizes = {"width": args.width, "depth": args.depth, "heads": args.width // 64, "grid": grid}
    return DalleTransformer(TransformerConfig(text_length=TEXT, **{**sizes, **words})).eval()


def fastest(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest of `rounds` turns of each, taken in turn, after one to warm up if there are several."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name].append(time.perf_counter() - start)
    return {name: min(times) for name, times in found.items()}


# --- sampling --------------------------------------------------------------------------------------------------------
def cached(model: DalleTransformer, batch: int, tokens: int) -> None:
    text = torch.ones(1, TEXT, dtype=torch.int64)
    sample_tokens(Decoding(model, text, batch), uniforms(range(batch), tokens), PLAIN)


def uncached(model: DalleTransformer, batch: int, at: int) -> None:
    """One token at a place of the picture, by the whole sequence up to it."""
    text, codes = (
        torch.ones(batch, TEXT, dtype=torch.int64),
        torch.zeros(batch, model.config.grid**2, dtype=torch.int64),
    )
    place = torch.arange(at)
    x = torch.cat([model.embed_text(text), model.embed_image(codes[:, :at], place)], 1)
    for block in model.blocks:  # dense attention: without a cache there is nothing faster to be had for so few keys
        x = block(x, lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    model.image_head(model.norm(x[:, -1]))


def gpt2(args: argparse.Namespace, grid: int):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=16384 + 8192,
            n_positions=TEXT + grid**2,
            n_embd=args.width,
            n_layer=args.depth,
            n_head=args.width // 64,
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()


def by_transformers(model, batch: int, tokens: int) -> None:
    text = torch.ones(batch, TEXT, dtype=torch.int64)
    mask = torch.ones_like(text)
    words = {"do_sample": True, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0, "top_k": 0}
    model.generate(text, attention_mask=mask, **words)


def sampling(args: argparse.Namespace) -> None:
    print("batch  tokens  sparse  full    no cache  GPT-2    x no cache  x GPT-2 (sparse, full)   ms per token")
    for grid in (16, 32):
        models = transformer(args, grid), transformer(args, grid, attention="full"), gpt2(args, grid)
        for batch in (1, 8):
            ms = milliseconds(models, batch, grid**2, 1 if grid == 32 else args.rounds)
            print(
                f"{batch:5}  {TEXT + grid**2:6}  {ms['sparse']:6.2f}  {ms['full']:6.2f}  {ms['uncached']:8.1f}  "
                f"{ms['gpt2']:6.2f}  {ms['uncached'] / ms['sparse']:9.1f}  "
                f"{ms['gpt2'] / ms['sparse']:8.2f}, {ms['gpt2'] / ms['full']:.2f}",
                flush=True,
            )


def milliseconds(models: tuple, batch: int, tokens: int, rounds: int) -> dict[str, float]:
    """Per image token, of each way of drawing; without a cache, the mean over the picture, by four of its tokens."""
    sparse, full, theirs = models
    calls = {
        "sparse": lambda: cached(sparse, batch, tokens),
        "full": lambda: cached(full, batch, tokens),
        "gpt2": lambda: by_transformers(theirs, batch, tokens),
    }
    ms = {name: seconds / tokens * 1e3 for name, seconds in fastest(calls, rounds).items()}
    places = range(tokens // 8, tokens, tokens // 4)
    slow = [fastest({"": lambda at=at: uncached(full, batch, at)}, 2)[""] * 1e3 for at in places]
    return ms | {"uncached": statistics.mean(slow)}


def position(args: argparse.Namespace) -> None:
    """Milliseconds of a token, early and late."""
    for attention in ("sparse", "full"):
        model = transformer(args, 32, attention=attention)
        predict = Decoding(model, torch.ones(1, TEXT, dtype=torch.int64), 8)
        tokens, times = torch.zeros(8, dtype=torch.int64), []
        for place in range(1024):
            start = time.perf_counter()
            predict(tokens if place else None, place)
            times.append((time.perf_counter() - start) * 1e3)
        early, late = (statistics.median(times[a:b]) for a, b in ((96, 224), (896, 1024)))
        print(f"{attention:6}  tokens 96 to 224: {early:.2f} ms, 896 to 1024: {late:.2f} ms, ratio {late / early:.3f}")


# --- training --------------------------------------------------------------------------------------------------------
def step(args: argparse.Namespace, attention: str, rounds: int) -> None:
    """Prints the fastest seconds of a training step and the peak memory in GB, of this process."""
    model = transformer(args, 32, attention=attention).train()
    model.config = replace(model.config, text_length=256)
    model.text_positions = torch.nn.Embedding(256, args.width)
    model.text = torch.nn.Embedding(16384 + 256, args.width)
    text, codes = torch.ones(1, 256, dtype=torch.int64), torch.zeros(1, 1024, dtype=torch.int64)
    seconds = fastest({"": lambda: model(text, codes)["loss"].backward()}, rounds)[""]
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)


def training(args: argparse.Namespace) -> None:
    found: dict[str, list[tuple[float, float]]] = {"sparse": [], "full": []}
    for _ in range(2):  # each in a process of its own, so that each has its own peak
        for attention, runs in found.items():
            sizes = ["--width", str(args.width), "--depth", str(args.depth), "--rounds", str(args.rounds)]
            command = [sys.executable, __file__, "--step", attention, *sizes]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.append(tuple(map(float, out.split())))
    best = {name: [min(column) for column in zip(*runs, strict=True)] for name, runs in found.items()}
    for name, (seconds, memory) in best.items():
        print(f"{name:6}  {seconds:.2f} s a step, peak {memory:.2f} GB")
    time_ratio, memory_ratio = (s / f for s, f in zip(best["sparse"], best["full"], strict=True))
    print(f"sparse over dense: time {time_ratio:.2f}, memory {memory_ratio:.2f}")


PARTS = {"sampling": sampling, "position": position, "training": training}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step(args, args.step, args.rounds)
        return
    for part in args.part or PARTS:
        print(f"\n{part}: width {args.width}, depth {args.depth}, {torch.get_num_threads()} threads, fp32")
        with torch.inference_mode(part != "training"):
            PARTS[part](args)


if __name__ == "__main__":
    main()
