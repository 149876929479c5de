"""What the Trainer costs: its loop against one written by hand with the same operations, in turns, in one run.

python benchmarks/bench_trainer.py [--width 384 --depth 4 --batch-size 8 --tokens 64 --steps 8 --rounds 5]

Both read the same synthetic batches through a DataLoader without workers, train the same transformer with fused AdamW,
clip, and follow the same schedule. Prints the time of a step, the fastest and the median of the rounds, and ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from zoo import Trainer
from zoo.training.optimizer import parameter_groups
from zoo.training.schedule import lr_at, warm_up_steps

VOCAB = 1024


class Tokens(Dataset):
    """Sample i: tokens (T,), always the same."""

    def __init__(self, count: int, tokens: int):
        self.rows = torch.randint(VOCAB, (count, tokens), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"tokens": self.rows[i]}


class Model(nn.Module):
    """Tokens (B, T) -> the loss of predicting each token from itself: only the cost matters here."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        layers = [
            nn.TransformerEncoderLayer(width, width // 32, 4 * width, 0.0, batch_first=True) for _ in range(depth)
        ]
        self.layers = nn.Sequential(*layers)
        self.out = nn.Linear(width, VOCAB)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        logits = self.out(self.layers(self.embed(tokens)))  # (B, T, V)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()), "logits": logits}


def by_trainer(model: nn.Module, data: Dataset, steps: int, batch_size: int, device: torch.device) -> None:
    trainer = Trainer(steps=steps, batch_size=batch_size, lr=1e-4, progress=False, pytorch_device=device)
    trainer.train(model, train_dataset=data)


def by_hand(model: nn.Module, data: Dataset, steps: int, batch_size: int, device: torch.device) -> None:
    optimizer = torch.optim.AdamW(parameter_groups(model.to(device), 0.1), lr=1e-4, fused=True)
    warm_up = warm_up_steps(0.1, steps)
    batches = iter(DataLoader(data, batch_size, shuffle=True, drop_last=True))
    model.train()
    for step in range(steps):
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in next(batches).items()}
        loss = model(**batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, peak=1e-4, total=steps, warm_up=warm_up)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in dict(width=384, depth=4, batch_size=8, tokens=64, steps=8, rounds=5).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Model(args.width, args.depth)
    data = Tokens(args.steps * args.batch_size, args.tokens)
    seconds: dict[str, list[float]] = {"hand": [], "trainer": []}
    for turn in range(args.rounds + 1):
        # Who goes first changes from round to round; round 0 warms both up.
        for name in sorted(seconds, reverse=turn % 2 == 1):
            start = time.perf_counter()
            (by_hand if name == "hand" else by_trainer)(model, data, args.steps, args.batch_size, device)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append((time.perf_counter() - start) / args.steps)
    for name, times in seconds.items():
        print(
            f"{name:8} {1000 * min(times):8.2f} ms fastest {1000 * statistics.median(times):8.2f} ms median, per step"
        )
    fastest = min(seconds["trainer"]) / min(seconds["hand"])
    median = statistics.median(a / b for a, b in zip(seconds["trainer"], seconds["hand"], strict=True))
    print(f"ratio    {fastest:8.4f} of the fastest, {median:.4f} median of the pairs, on {device}")


if __name__ == "__main__":
    main()
