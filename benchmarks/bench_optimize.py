"""What `zoo.optimize` gains: training steps of the plain model against the optimized one, in turns, in one run.

python benchmarks/bench_optimize.py [--width 256 --depth 4 --batch-size 8 --rounds 5 --compile]

The models: torch's TransformerEncoder, the vision tower of transformers' CLIP and its GPT-2, both in eager attention,
and a plain convolutional net. Prints each report, then the time of a forward and backward pass before and after, the
median of the rounds, and their ratio.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
import transformers
from torch import Tensor, nn

import zoo

VOCAB = 1024


def encoder(width: int, depth: int, n: int) -> tuple[nn.Module, dict[str, Tensor]]:
    layer = nn.TransformerEncoderLayer(width, width // 64, 4 * width, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), {"src": torch.randn(n, 128, width)}


def clip_vision(width: int, depth: int, n: int) -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=depth)
    config = transformers.CLIPVisionConfig(**sizes, num_attention_heads=width // 64, image_size=224, patch_size=16)
    config._attn_implementation = "eager"
    return transformers.CLIPVisionModel(config), {"pixel_values": torch.randn(n, 3, 224, 224)}


def gpt2(width: int, depth: int, n: int) -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = dict(n_embd=width, n_layer=depth, n_head=width // 64, vocab_size=VOCAB, n_positions=256)
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, attn_implementation="eager")
    tokens = torch.randint(VOCAB, (n, 256))
    return transformers.GPT2LMHeadModel(config), {"input_ids": tokens, "labels": tokens}


def convolutions(width: int, depth: int, n: int) -> tuple[nn.Module, dict[str, Tensor]]:
    layers: list[nn.Module] = [nn.Conv2d(3, width // 4, 3, 2, 1)]
    for _ in range(2 * depth):
        layers += [nn.Conv2d(width // 4, width // 4, 3, padding=1), nn.BatchNorm2d(width // 4), nn.ReLU()]
    return nn.Sequential(*layers), {"input": torch.randn(n, 3, 64, 64)}


def seconds(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """One forward and backward pass."""
    start = time.perf_counter()
    outputs = model(**batch)
    loss = outputs.mean() if isinstance(outputs, Tensor) else outputs.get("loss", outputs[0].mean())
    loss.backward()
    if loss.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare(
    model: nn.Module, twin: nn.Module, batch: dict[str, Tensor], rounds: int
) -> tuple[list[float], list[float]]:
    """The seconds of each round of the two models in turns; round 0 warms both up."""
    times: list[tuple[float, float]] = []
    for turn in range(rounds + 1):
        # Who goes first changes from round to round.
        pair = {id(one): seconds(one, batch) for one in ((model, twin) if turn % 2 else (twin, model))}
        times.append((pair[id(model)], pair[id(twin)]))
    before, after = zip(*times[1:], strict=True)
    return list(before), list(after)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(width=256, depth=4, batch_size=8, rounds=5).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for build in (encoder, clip_vision, gpt2, convolutions):
        torch.manual_seed(0)
        model, batch = build(args.width, args.depth, args.batch_size)
        model, batch = model.to(device).train(), {name: tensor.to(device) for name, tensor in batch.items()}
        print(f"--- {build.__name__}")
        twin = copy.deepcopy(model)
        print(zoo.optimize(twin, batch, compile=args.compile))
        before, after = compare(model, twin, batch, args.rounds)
        ratio = statistics.median(a / b for a, b in zip(before, after, strict=True))
        print(f"before {statistics.median(before):.4f} s  after {statistics.median(after):.4f} s  ratio {ratio:.3f}x\n")


if __name__ == "__main__":
    main()
