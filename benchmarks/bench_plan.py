"""What `zoo plan` says against what a run takes: the peak of resident memory of three steps by the Trainer, on the CPU.

python benchmarks/bench_plan.py [--width 512 --depth 8 --batch-size 8 --tokens 128] [--engine pytorch ...]

Each run is a process of its own, or two for DDP and DeepSpeed. What it takes is the peak less what there was before the
model and after a run of a tiny one; the plan's is `Need.device`, and what is offloaded, for this very model and batch.
On a CPU the plan counts no context of a GPU; the share of the host is that of one process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

RUNS = {  # engine or deepspeed_config, accumulation, checkpoint_activations, precision -> processes
    "pytorch": (1, {}),
    "pytorch, accumulating": (1, {"accumulate": 2}),
    "pytorch, recomputing": (1, {"recompute": True}),
    "pytorch, bf16": (1, {"precision": "bf16"}),
    "pytorchDDP": (2, {}),
    **{name: (2, {}) for name in ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")},
}


def build(width: int, depth: int, vocabulary: int):
    """A causal transformer whose forward is its loss."""
    from torch import nn

    from zoo.blocks.transformer import Transformer

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(vocabulary, width), nn.Linear(width, vocabulary)
            self.body = Transformer(width=width, depth=depth, heads=width // 64, causal=True)

        def set_grad_checkpointing(self, enable: bool = True) -> None:
            self.body.checkpointing = enable

        def forward(self, tokens):
            logits = self.out(self.body(self.embed(tokens)))  # (B, T, V)
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())}

    return Causal()


def resident(name: str) -> int:
    """VmRSS now, or VmHWM, its peak: bytes of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def train(run: str, processes: int, given: dict) -> None:
    """Three steps in this process; rank 0 prints the bytes that it took."""
    import torch

    from zoo import Trainer

    torch.set_num_threads(1)
    name = run.partition(",")[0]
    engine = name if name.startswith("pytorch") else "deepspeed"

    def three_steps(model: torch.nn.Module) -> None:
        rows = torch.randint(64, (64 * processes, given["tokens"]))
        trainer = Trainer(
            env_type=engine,
            deepspeed_config=name if engine == "deepspeed" else None,
            steps=3,
            batch_size=given["batch_size"],
            gradient_accumulation_steps=given["accumulate"],
            checkpoint_activations=given["recompute"],
            precision=given["precision"],
            pytorch_device="cpu",
            progress=False,
        )
        trainer.train(model, train_dataset=[{"tokens": row} for row in rows])

    three_steps(build(64, 1, 64))  # libraries that are first imported by a run are no part of its size
    gc.collect()
    before = resident("VmRSS")
    three_steps(build(given["width"], given["depth"], given["vocabulary"]))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps({"taken": resident("VmHWM") - before, "before": before}), flush=True)


def planned(run: str, processes: int, given: dict) -> int:
    """What the plan says that one process takes."""
    import torch

    from zoo.training.activations import activation_bytes, largest_layer
    from zoo.training.memory import Machine, Setup, Sizes, host_states, plans
    from zoo.weights import blank

    with blank(), torch.device("meta"):
        model = build(given["width"], given["depth"], given["vocabulary"])
    batch = {"tokens": torch.zeros(given["batch_size"], given["tokens"], dtype=torch.int64, device="meta")}
    total = sum(p.numel() for p in model.parameters())
    name = run.partition(",")[0]
    (plan,) = plans(
        Sizes(parameters=total, trained=total, largest=largest_layer(model)),
        Machine(gpu=None, host=1 << 50),
        Setup(
            precision=given["precision"],
            batch_size=given["batch_size"],
            accumulation=given["accumulate"],
            checkpoint_activations=given["recompute"],
            world_size=processes,
            per_machine=processes,
        ),
        lambda setup: activation_bytes(model, batch, computing=setup.computing, recompute=setup.checkpoint_activations),
        [None if name.startswith("pytorch") else name],
    )
    states = host_states(Sizes(parameters=total, trained=total, largest=largest_layer(model)), plan.setup)
    return plan.need.device + states // processes


def taken(run: str, processes: int, given: dict, seconds: float = 300) -> int:
    """What rank 0 of a run in new processes takes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parent.parent
    started = []
    for rank in range(processes):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        ranks |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, __file__, "--child", run, json.dumps(given)]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed is given back, as the peak is to be of tensors
        if processes > 1:
            environment |= {key: str(value) for key, value in ranks.items()}
        started.append(subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=seconds)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise RuntimeError(f"{run}: the run failed")
    return json.loads(next(line for line in said[0].splitlines() if line.startswith('{"taken"')))["taken"]


def compare(run: str, **changed: object) -> tuple[int, int]:
    """Bytes planned and bytes taken."""
    processes, usual = RUNS[run]
    given = {"accumulate": 1, "recompute": False, "precision": "fp32", "vocabulary": 8192, **usual, **changed}
    return planned(run, processes, given), taken(run, processes, given)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        run, given = sys.argv[2], json.loads(sys.argv[3])
        train(run, RUNS[run][0], given)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(width=512, depth=8, batch_size=8, tokens=128).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--run", nargs="*", choices=RUNS, default=list(RUNS))
    args = parser.parse_args()
    sizes = {name: value for name, value in vars(args).items() if name != "run"}
    print(f"{'run':24} {'planned MB':>10} {'taken MB':>9} {'planned / taken':>16}")
    for run in args.run:
        ours, theirs = compare(run, **sizes)
        print(f"{run:24} {ours / 1e6:10.0f} {theirs / 1e6:9.0f} {ours / theirs:16.2f}", flush=True)


if __name__ == "__main__":
    main()
