"""A run folder -> the files that ship: python examples/package_model.py runs/clip/best zoo/assets/clip-emoji-tiny

Matrices and kernels are stored in half precision, which halves the file; norms, biases and scalars stay in fp32. How a
VQGAN's codes were used in training is left out. --eight-bits stores those matrices that matter least in 8 bits.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch

from zoo import weights


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a folder with model.safetensors and config.json")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--eight-bits", metavar="REGEX", help="matrices whose names match are stored as float8_e4m3fn")
    args = parser.parse_args(argv)
    state = weights.read(args.run / "model.safetensors")
    config = json.loads((args.run / "config.json").read_text(encoding="utf-8"))
    for sizes in (config, config.get("image", {})):  # of a VQGAN, or of a model that holds one
        if "restart" in sizes:
            state = {name: t for name, t in state.items() if not name.endswith(("quantize.counts", "quantize.sums"))}
            sizes |= {"decay": 0.0, "restart": 0.0}
    halved = {name: t.half() if t.is_floating_point() and t.ndim > 1 else t for name, t in state.items()}
    for name in halved if args.eight_bits else ():
        if re.search(args.eight_bits, name) and halved[name].dtype == torch.float16:
            halved[name] = state[name].to(torch.float8_e4m3fn)
    args.out.mkdir(parents=True, exist_ok=True)
    weights.write(halved, args.out / "model.safetensors")
    (args.out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    size = (args.out / "model.safetensors").stat().st_size
    print(f"{args.out / 'model.safetensors'}: {sum(t.numel() for t in state.values()):,} numbers, {size:,} bytes")


if __name__ == "__main__":
    main()
