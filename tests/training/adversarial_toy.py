"""A small autoencoder, and its judge; also a command: python adversarial_toy.py FOLDER PROCESSES [KILL_AT]."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from zoo.training.adversarial import AdversarialTrainer, Adversary


class Autoencoder(nn.Module):
    """Pictures (B, 3, 8, 8) of 0..1 and back, through two channels. Dies in the forward of micro-batch `kill_at`."""

    def __init__(self, kill_at: int = -1):
        super().__init__()
        torch.manual_seed(0)
        self.encode = nn.Conv2d(3, 2, 3, padding=1)
        self.drop = nn.Dropout(0.1)
        self.decode = nn.Conv2d(2, 3, 3, padding=1)
        self.config = {"channels": 2}
        self.kill_at, self.calls = kill_at, 0

    @property
    def last_layer(self) -> nn.Parameter:
        return self.decode.weight

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        target = 2 * image - 1
        latents = self.encode(target).tanh()
        drawn = self.decode(self.drop(latents))
        pixel, extra = (drawn - target).abs().mean(), latents.square().mean()
        return {"loss": pixel + 0.1 * extra, "pixel": pixel, "image": drawn, "target": target}


def discriminator(norm: bool = True) -> nn.Sequential:
    """Judges patches; with `norm` it has buffers that follow the data."""
    torch.manual_seed(1)
    middle = nn.BatchNorm2d(8) if norm else nn.Identity()
    # A bias before a norm has no gradient but noise, which Adam makes large.
    return nn.Sequential(nn.Conv2d(3, 8, 4, 2, 1, bias=not norm), middle, nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 3))


class Distance(nn.Module):
    """Stands for LPIPS: pictures of 0..1 -> (B,)."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return (first.square() - second.square()).square().mean((1, 2, 3))


class Pictures(Dataset):
    """Sample i is always the same up to a little noise."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(i)
        return {"image": (torch.rand(3, 8, 8, generator=generator) + 0.05 * torch.rand(3, 8, 8)).clamp(0, 1)}


ADVERSARY = dict(start=2, warm_up=2, rest=0.0, adversarial=0.5, perceptual=2.0)


def trainer(folder: Path | None, norm: bool = True, adversary: dict | None = None, **changed) -> AdversarialTrainer:
    """Of 8 steps; the discriminator learns from step 2 and counts from step 4."""
    words = dict(steps=8, batch_size=4, lr=1e-2, weight_decay=0.0, log_interval=2, save_interval=3, keep=9, clip_grad=0)
    words |= dict(run_folder=folder, progress=False, pytorch_device="cpu", betas=(0.5, 0.9), warm_up=0) | changed
    return AdversarialTrainer(
        discriminator=discriminator(norm),
        perceptual=Distance(),
        adversary=Adversary(**ADVERSARY | (adversary or {})),
        **words,
    )


if __name__ == "__main__":
    processes = int(sys.argv[2])
    words = {"env_type": "auto", "num_gpus": processes, "batch_size": 8 // processes, "ema": 0.9}
    model = Autoencoder(int(sys.argv[3]) if len(sys.argv) > 3 else -1)
    model.drop.p = 0.0 if processes > 1 else 0.1  # ranks draw masks of their own
    trainer(Path(sys.argv[1]), norm=processes == 1 or "norm" in sys.argv, **words).train(
        model, train_dataset=Pictures()
    )
