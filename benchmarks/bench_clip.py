"""zoo's CLIP against transformers' CLIPModel: same sizes, same weights, same inputs, in turn, ratios printed.

    python benchmarks/bench_clip.py                 # ViT-B/32, everything, about four minutes on two cores
    python benchmarks/bench_clip.py --only load

The weights are random, saved by transformers in the published layout, and read by both sides from that folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

CAPTIONS = [
    "a photo of a red apple on a wooden table",
    "two dogs run along the beach at sunset",
    "an old map of the city, drawn in ink",
    "a child in a yellow raincoat jumps into a puddle",
    "the night train leaves the station",
    "a bowl of noodles with egg and spring onions",
    "a steep road through the autumn forest",
    "a portrait of a woman reading by the window",
] * 4

LOAD_ZOO = """
from zoo import AutoLoader
import zoo.auto_loader, zoo.models.clip, zoo.weights, zoo.converters.clip, safetensors.torch, torch
def load(folder):
    return AutoLoader("txt_img_matching", "clip-base-p32-224", weights=folder, device="cpu").get_model()
"""
LOAD_TRANSFORMERS = """
import torch
from transformers import CLIPModel
import transformers.models.clip.modeling_clip
def load(folder):
    return CLIPModel.from_pretrained(folder)
"""
MEASURE = """
import json, re, sys, time
from pathlib import Path
def resident(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
torch.nn.Linear(1, 1)  # the first module of a process costs torch 80 ms; transformers pays that on import
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
start = time.perf_counter()
model = load(sys.argv[1])
seconds = time.perf_counter() - start
total = sum(float(p.sum()) for p in model.parameters())  # every weight is needed sooner or later
print(json.dumps({"seconds": seconds, "memory": resident("VmHWM") - before}))
"""


def in_turn(ours, theirs, rounds: int) -> tuple[float, float]:
    """Median seconds of each, measured alternately so that a noisy machine is noisy to both."""
    ours(), theirs()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for call, taken in zip((ours, theirs), times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return median(times[0]), median(times[1])


def report(name: str, ours: float, theirs: float, unit: str = "ms", scale: float = 1e3) -> None:
    digits = 2 if scale == 1 else 1
    ours, theirs = ours * scale, theirs * scale
    print(f"{name:<44}{ours:>10.{digits}f}{theirs:>14.{digits}f} {unit:<4}{theirs / ours:>8.2f}x", flush=True)


def bench_load(folder: Path, rounds: int) -> None:
    size = (folder / "model.safetensors").stat().st_size
    openai = folder / "openai"  # the layout in which OpenAI's weights are published; transformers cannot read it
    in_openai_layout(folder, openai)
    sides = {
        "openai": (LOAD_ZOO, openai),
        "hugging face": (LOAD_ZOO, folder),
        "transformers": (LOAD_TRANSFORMERS, folder),
    }
    results: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, (code, path) in sides.items():
            run = [sys.executable, "-c", code + MEASURE, str(path)]
            results[side].append(json.loads(subprocess.run(run, check=True, capture_output=True, text=True).stdout))
    seconds = {side: median(r["seconds"] for r in rows) for side, rows in results.items()}
    memory = {side: max(r["memory"] for r in rows) / size for side, rows in results.items()}
    for side, what in (("openai", "OpenAI's safetensors"), ("hugging face", "transformers' safetensors")):
        report(f"load {what}", seconds[side], seconds["transformers"])
        report("  peak memory, all used / file size", memory[side], memory["transformers"], "x", 1)


def in_openai_layout(folder: Path, out: Path) -> None:
    from dataclasses import asdict

    from zoo import AutoLoader, weights
    from zoo.converters.clip import to_openai

    model = AutoLoader("txt_img_matching", "clip-base-p32-224", weights=folder, device="cpu").get_model()
    weights.write(to_openai(model.state_dict(), asdict(model.config)), out / "open_clip_model.safetensors")


def bench_encode(folder: Path, rounds: int) -> None:
    import torch
    from transformers import CLIPModel

    from zoo import AutoLoader

    loader = AutoLoader("txt_img_matching", "clip-base-p32-224", weights=folder, device="cpu")
    model, tokenizer = loader.get_model(), loader.get_tokenizer()
    peer = CLIPModel.from_pretrained(folder).eval()
    tokens = tokenizer.tokenize_as_tensor(CAPTIONS)
    # What transformers' processor gives with padding="max_length": 77 ids, padded with the end token.
    length = int((tokens != 0).sum(1).max())
    padded = torch.where(tokens == 0, 49407, tokens)
    mask = (tokens != 0).long()
    images = torch.randn(8, 3, 224, 224)
    with torch.inference_mode():
        ours = model.encode_text(tokens)
        theirs = peer.get_text_features(input_ids=padded, attention_mask=mask)
        theirs = getattr(theirs, "pooler_output", theirs)
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        pair = in_turn(
            lambda: model.encode_text(tokens),
            lambda: peer.get_text_features(input_ids=padded, attention_mask=mask),
            rounds,
        )
        report("encode_text, 32 captions, padded to 77", *pair)
        short, short_mask = padded[:, :length], mask[:, :length]
        pair = in_turn(
            lambda: model.encode_text(tokens),
            lambda: peer.get_text_features(input_ids=short, attention_mask=short_mask),
            rounds * 2,
        )
        report(f"encode_text, 32 captions, both at {length} tokens", *pair)
        pair = in_turn(
            lambda: model.encode_image(images), lambda: peer.get_image_features(pixel_values=images), rounds * 2
        )
        report("encode_image, batch 8", *pair)


def bench_train(folder: Path, rounds: int) -> None:
    import torch
    from transformers import CLIPModel

    from zoo import AutoLoader

    loader = AutoLoader("txt_img_matching", "clip-base-p32-224", weights=folder, device="cpu")
    model = loader.get_model().train()
    peer = CLIPModel.from_pretrained(folder).train()
    tokens = loader.get_tokenizer().tokenize_as_tensor(CAPTIONS)
    padded, mask = torch.where(tokens == 0, 49407, tokens), (tokens != 0).long()
    images = torch.randn(32, 3, 224, 224)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-6, fused=True) for m in (model, peer)]

    def step(optimizer, loss_of):
        def run():
            loss = loss_of()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return run

    pair = in_turn(
        step(optimizers[0], lambda: model(images, tokens)["loss"]),
        step(
            optimizers[1],
            lambda: peer(input_ids=padded, attention_mask=mask, pixel_values=images, return_loss=True).loss,
        ),
        rounds,
    )
    report("training step, batch 32", *pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("load", "encode", "train"), help="one part instead of all")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side (default: 5)")
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: torch's own choice)")
    args = parser.parse_args()

    import torch
    from transformers import CLIPConfig, CLIPModel, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        config = CLIPConfig()  # its defaults are ViT-B/32
        config.text_config.eos_token_id, config.text_config.bos_token_id = 49407, 49406
        CLIPModel(config).save_pretrained(folder)
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, ViT-B/32, fp32")
        print(f"{'':<44}{'zoo':>10}{'transformers':>14} {'':<4}{'ratio':>9}")
        parts = {"load": bench_load, "encode": bench_encode, "train": bench_train}
        for name, part in parts.items():
            if args.only in (None, name):
                part(Path(folder), args.rounds)


if __name__ == "__main__":
    main()
