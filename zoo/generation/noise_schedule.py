"""How much noise a diffusion model meets at each timestep, and what it learns there (Ho et al. 2020).

x = sqrt(alpha) x0 + sqrt(1 - alpha) noise, with alpha the product of 1 - beta over the timesteps up to this one.
x, x0 and noise are latents (B, C, h, w), or anything else with the batch first. B batch, T timesteps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.errors import SettingsError, nearest

SHAPES = ("linear", "scaled_linear", "cosine")
PREDICTIONS = ("epsilon", "v", "sample")


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """The noise that a network was trained with; the defaults are Stable Diffusion 1's. Raises SettingsError.

    `steps`: timesteps, T. `shape`: "linear" from `beta_start` to `beta_end`; "scaled_linear", linear in the square
    roots, as in latent diffusion; "cosine" (Nichol and Dhariwal 2021), which has no use for the two betas.
    `prediction`: what the network gives, the noise ("epsilon"), the velocity ("v", Salimans and Ho 2022), or the clean
    latents ("sample"). `zero_snr`: nothing but noise at the last timestep (Lin et al. 2023).

    Of sampling, what published checkpoints fix: `offset`, added to timesteps of "leading" spacing; `last_alpha_one`:
    DDIM and PNDM end at alpha = 1 instead of at that of timestep 0.
    """

    steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    shape: str = "scaled_linear"
    prediction: str = "epsilon"
    zero_snr: bool = False
    offset: int = 1
    last_alpha_one: bool = False

    def __post_init__(self) -> None:
        for name, known in (("shape", SHAPES), ("prediction", PREDICTIONS)):
            word = getattr(self, name)
            if word not in known:
                raise SettingsError(f"{name}={word!r} is not one of {', '.join(known)}; {nearest(str(word), known)}")
        if self.steps < 2:
            raise SettingsError(f"steps={self.steps!r}: give 2 or more")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise SettingsError(f"beta_start={self.beta_start!r} and beta_end={self.beta_end!r}: 0 < start <= end < 1")
        if self.zero_snr and self.prediction == "epsilon":
            # x0 cannot be had from the noise where the latents are nothing but noise.
            raise SettingsError("zero_snr=True needs prediction='v' or 'sample': 'epsilon' divides by zero at the end")

    @classmethod
    def from_dict(cls, sizes: Mapping) -> NoiseConfig:
        """The config that `dataclasses.asdict`, and so a config.json, says. Unknown names raise TypeError."""
        return cls(**sizes)


class NoiseSchedule:
    """The noise at each timestep. Not a module: it has no weights, and half precision would ruin its numbers.

    Timesteps are int64, (B,) or 0-dimensional. Mathematics is in fp32; results have the dtype of the latents given.
    """

    def __init__(self, config: NoiseConfig):
        self.config = config
        self.alphas = _alphas(config)  # (T,)
        self._copies = {self.alphas.device: self.alphas}

    def add_noise(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha) x0 + sqrt(1 - alpha) noise."""
        signal, sigma = self._roots(timesteps, x0)
        return (signal * x0.float() + sigma * noise.float()).to(x0.dtype)

    def velocity(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(alpha) noise - sqrt(1 - alpha) x0 (Salimans and Ho 2022, appendix D)."""
        signal, sigma = self._roots(timesteps, x0)
        return (signal * noise.float() - sigma * x0.float()).to(x0.dtype)

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network learns to give, by `config.prediction`."""
        if self.config.prediction == "epsilon":
            return noise
        return x0 if self.config.prediction == "sample" else self.velocity(x0, noise, timesteps)

    def x0(self, output: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        """The clean latents that follow from the network's `output` for the noisy ones `x`."""
        return x0_of(self.config.prediction, output.float(), x.float(), *self._roots(timestep, x)).to(x.dtype)

    def epsilon(self, output: Tensor, x: Tensor, timestep: Tensor) -> Tensor:
        """The noise that follows from the network's `output` for the noisy latents `x`."""
        if self.config.prediction == "epsilon":
            return output.to(x.dtype)
        signal, sigma = self._roots(timestep, x)
        if self.config.prediction == "sample":
            noise = (x.float() - signal * output.float()) / sigma
        else:
            noise = signal * output.float() + sigma * x.float()
        return noise.to(x.dtype)

    def snr(self, timesteps: Tensor) -> Tensor:
        """The ratio of signal to noise, alpha / (1 - alpha), (B,)."""
        alphas = self._at(timesteps)
        return alphas / (1 - alphas)

    def min_snr_weight(self, timesteps: Tensor, gamma: float) -> Tensor:
        """What each picture's squared error is multiplied with, (B,): min-SNR of Hang et al. 2023, 5 is their gamma.

        It is min(SNR, gamma) for the error of x0, so divided by SNR for that of the noise, by SNR + 1 for that of v.
        """
        snr = self.snr(timesteps)
        weight = snr.clamp(max=gamma)
        return weight / {"epsilon": snr, "v": snr + 1, "sample": 1}[self.config.prediction]

    def _at(self, timesteps: Tensor) -> Tensor:
        """The alphas of the timesteps, on their device."""
        device = timesteps.device
        if device not in self._copies:  # copied once: a copy at each training step would wait for the device
            self._copies[device] = self.alphas.to(device)
        return self._copies[device][timesteps]

    def _roots(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha), sqrt(1 - alpha): (B, 1, ...), or 0-dimensional as the timestep, and then on its device."""
        alphas = self._at(timesteps)
        if alphas.dim():
            alphas = alphas.to(like.device).view(-1, *[1] * (like.dim() - 1))
        return alphas**0.5, (1 - alphas) ** 0.5


def x0_of(prediction: str, output: Tensor, x: Tensor, signal: float | Tensor, sigma: Tensor) -> Tensor:
    """x0 from what the network gave for x = signal x0 + sigma noise, which it saw divided to variance 1."""
    if prediction == "sample":
        return output
    if prediction == "epsilon":
        return (x - sigma * output) / signal
    variance = signal**2 + sigma**2
    return (signal * x - variance**0.5 * sigma * output) / variance


def _alphas(config: NoiseConfig) -> Tensor:
    """(T,) on the CPU. In fp32 from the betas on, as diffusers has them: fp64 gives up to 2e-6 of them more or less."""
    line = {"dtype": torch.float32, "device": "cpu"}
    if config.shape == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, config.steps, **line)
    elif config.shape == "scaled_linear":
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.steps, **line) ** 2
    else:
        left = [math.cos((i / config.steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(config.steps + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in itertools.pairwise(left)], **line)
    alphas = (1 - betas).cumprod(0)
    if not config.zero_snr:
        return alphas
    roots = alphas.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    alphas = ((roots - last) * (first / (first - last))) ** 2
    # By way of the betas again, for diffusers' rounding.
    betas = 1 - torch.cat([alphas[:1], alphas[1:] / alphas[:-1]])
    return (1 - betas).cumprod(0)
