"""A model with dropout and a data set with augmentation, small enough to train in milliseconds; also a command.

python toy.py RUN_FOLDER [KILL_AT]: trains, and dies by SIGKILL in the forward of micro-batch KILL_AT.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from zoo.training import Trainer

TIMES = ("seconds", "samples_per_s", "data_wait", "memory_gb", "tflops", "comm", "rank_samples_per_s", "resumed_from")


class Net(nn.Module):
    """x (B, 4) -> logits (B, 1)."""

    def __init__(self, dropout: float = 0.2, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(
                nn.Linear(4, 16), nn.GELU(), nn.Dropout(dropout), nn.LayerNorm(16), nn.Linear(16, 1)
            )
        self.config = {"width": 16, "dropout": dropout}

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"loss": (logits - y).square().mean(), "logits": logits}


class Points(Dataset):
    """Sample i is always about i; a little noise is drawn from each of the three generators. Notes what was read."""

    def __init__(self, count: int = 22, noise: float = 0.1):
        self.count, self.noise, self.read = count, noise, []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        self.read.append(i)
        x = torch.tensor([i % 3, i % 5, i % 7, 1.0])
        noise = torch.rand(4) + random.random() + float(np.random.rand())
        return {"x": x + self.noise * noise, "y": x.sum()[None] / 5}


def settings(folder: Path | None, **changed: object) -> dict:
    """Settings of a run of 12 steps that saves each third; 22 samples, 5 batches per epoch, accumulation of 2."""
    usual = dict(
        steps=12, batch_size=4, gradient_accumulation_steps=2, lr=1e-2, log_interval=2, save_interval=3, keep=9
    )
    return usual | dict(run_folder=folder, progress=False, pytorch_device="cpu") | changed


def train(folder: Path | None, model: nn.Module | None = None, data: object = None, call: object = None, **changed):
    """Trains and returns the model; `call` are keywords for train()."""
    model = Net() if model is None else model
    data = Points() if data is None else data
    Trainer(**settings(folder, **changed)).train(model, train_dataset=data, **(call or {}))
    return model


def lines(folder: Path, times: bool = False) -> list[dict]:
    """What log.jsonl says, without what the clock says."""
    read = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return read if times else [{k: v for k, v in line.items() if k not in TIMES} for line in read]


def same(a: nn.Module | dict, b: nn.Module | dict) -> bool:
    """Whether two models' weights are equal bit for bit."""
    a, b = (x.state_dict() if isinstance(x, nn.Module) else x for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Killed(Net):
    """Dies in the forward of micro-batch `at`, or there calls `instead`."""

    def __init__(self, at: int, instead: object = None, **sizes):
        super().__init__(**sizes)
        self.at, self.instead, self.calls = at, instead, 0

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.calls += 1
        if self.calls == self.at and self.training:
            self.instead() if self.instead else os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x, y)


if __name__ == "__main__":
    train(Path(sys.argv[1]), Killed(int(sys.argv[2]) if len(sys.argv) > 2 else -1))
