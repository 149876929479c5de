"""One step of each sampler: a pure function from what the network has given so far to the next latents.

Steps are counted from 0, N in all. B batch, T timesteps that the network was trained with. Factors are 0-dimensional
tensors on the CPU, which act on latents of any device and wait for none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.generation.noise_schedule import NoiseSchedule, x0_of


@dataclass(frozen=True, kw_only=True)
class Path:
    """The levels of noise that a sampler visits, from `start` on.

    `timesteps` (N,): what the network is told. `sigmas` (N + 1,): of samplers that count in sigmas, the ratio of noise
    to signal before each step, and 0 after the last. `stride`: T // steps, how far DDIM and PNDM go; `last_alpha`:
    their alpha after the last step. `eta`: DDIM's noise. `exploding`: latents are x0 + sigma noise (variance
    exploding), and not of variance 1. `draws_last`: Euler's ancestral asks for noise even where its factor is 0.
    """

    schedule: NoiseSchedule
    timesteps: Tensor
    sigmas: Tensor | None
    stride: int
    start: int
    eta: float
    last_alpha: Tensor
    exploding: bool
    draws_last: bool

    def alpha(self, timestep: int) -> Tensor:
        return self.schedule.alphas[timestep] if timestep >= 0 else self.last_alpha

    def roots(self, number: int) -> tuple[float | Tensor, Tensor]:
        """signal and sigma before step `number`: the latents are signal x0 + sigma noise."""
        sigma = self.sigmas[number]
        if self.exploding:
            return 1.0, sigma
        signal = 1 / (sigma**2 + 1) ** 0.5
        return signal, sigma * signal

    def x0(self, number: int, output: Tensor, x: Tensor) -> Tensor:
        """What follows for x0 from the network's output before step `number`, for samplers that count in sigmas."""
        return x0_of(self.schedule.config.prediction, output, x, *self.roots(number))


# (what the network gave, the latents it was asked about), of up to MEMORY last steps, this step's last; fp32.
History = Sequence[tuple[Tensor, Tensor]]
MEMORY = 5
Noise = Callable[[], Tensor]  # fresh standard normal noise
Step = Callable[[Path, int, History, Noise], Tensor]


def ddim(path: Path, number: int, history: History, noise: Noise) -> Tensor:
    """Song et al. 2020, equations 12 and 16."""
    timestep = int(path.timesteps[number])
    before, after = path.alpha(timestep), path.alpha(timestep - path.stride)
    if not path.eta:
        return _move(path, *history[-1], timestep, after)
    deviation = path.eta * ((1 - after) / (1 - before) * (1 - before / after)) ** 0.5
    return _move(path, *history[-1], timestep, after, deviation) + deviation * noise()


def _move(path: Path, output: Tensor, x: Tensor, timestep: int, after: Tensor, deviation: float | Tensor = 0) -> Tensor:
    """From the timestep's noise straight to that of alpha `after`, less what is to be drawn afresh."""
    at = torch.tensor(timestep)
    x0, epsilon = path.schedule.x0(output, x, at), path.schedule.epsilon(output, x, at)
    # Clamped: from no signal with eta 1 all noise is drawn afresh, and rounding may leave less than none.
    return after**0.5 * x0 + (1 - after - deviation**2).clamp(min=0) ** 0.5 * epsilon


def ddpm(path: Path, number: int, history: History, noise: Noise) -> Tensor:
    """Ho et al. 2020, equations 6 and 7, between timesteps that need not be neighbours; after the last alpha is 1."""
    timesteps = path.timesteps.tolist()
    timestep, (output, x) = timesteps[number], history[-1]
    before = path.alpha(timestep)
    after = path.alpha(timesteps[number + 1]) if number + 1 < len(timesteps) else torch.tensor(1.0)
    x0 = path.schedule.x0(output, x, torch.tensor(timestep))
    alpha = before / after  # of this step alone
    mean = after**0.5 * (1 - alpha) / (1 - before) * x0 + alpha**0.5 * (1 - after) / (1 - before) * x
    if timestep == 0:
        return mean
    variance = (1 - after) / (1 - before) * (1 - alpha)
    return mean + variance.clamp(min=1e-20) ** 0.5 * noise()


# Adams and Bashforth's weights of the last outputs, newest first, by how many there are.
ADAMS = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def pndm(path: Path, number: int, history: History, noise: Noise) -> Tensor:
    """PLMS, the linear multistep part of PNDM (Liu et al. 2022), as CompVis and diffusers have it for latents.

    The first step is gone twice: by its first output, then again from its beginning by the mean of that and the output
    at its end, which is not used again. The count is from `start`, as diffusers': there, with no timestep doubled, the
    latents of img2img are one step of noise above what the network is told.
    """
    timestep, done = int(path.timesteps[number]), number - path.start
    outputs = [output for output, _ in reversed(history)]
    if done == 1:
        mean = (outputs[0] + outputs[1]) / 2
        return _move(path, mean, history[0][1], timestep + path.stride, path.alpha(timestep))
    if 1 < done < MEMORY:
        del outputs[-2]
    weights = ADAMS[min(len(outputs), 4)]
    mean = sum(weight * output for weight, output in zip(weights, outputs[:4], strict=True))
    return _move(path, mean, history[-1][1], timestep, path.alpha(timestep - path.stride))


def euler(path: Path, number: int, history: History, noise: Noise) -> Tensor:
    """Euler's method along dx/dsigma = (x - x0) / sigma (Karras et al. 2022, algorithm 1 without churn)."""
    return _slide(path, number, history, path.sigmas[number + 1])


def euler_a(path: Path, number: int, history: History, noise: Noise) -> Tensor:
    """Ancestral sampling by Euler's method (k-diffusion): below the next sigma, and up to it with fresh noise."""
    before, after = path.sigmas[number], path.sigmas[number + 1]
    up = (after**2 * (before**2 - after**2) / before**2) ** 0.5
    x = _slide(path, number, history, (after**2 - up**2) ** 0.5)
    last = number + 1 == len(path.timesteps)
    return x + up * noise() if path.draws_last or not last else x


def _slide(path: Path, number: int, history: History, after: Tensor) -> Tensor:
    """Straight from this step's sigma to the sigma `after`."""
    (output, x), sigma = history[-1], path.sigmas[number]
    return x + (x - path.x0(number, output, x)) / sigma * (after - sigma)


def dpm_2m(path: Path, number: int, history: History, noise: Noise) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): of first order at the first step and at the last, to sigma 0."""
    (_, sigma), (next_signal, next_sigma) = path.roots(number), path.roots(number + 1)
    x0 = path.x0(number, *history[-1])
    width = _log_snr(path, number + 1) - _log_snr(path, number)
    if len(history) > 1 and number + 1 < len(path.timesteps):
        before = path.x0(number - 1, *history[-2])
        x0 = x0 + width / (_log_snr(path, number) - _log_snr(path, number - 1)) / 2 * (x0 - before)
    return next_sigma / sigma * history[-1][1] - next_signal * torch.expm1(-width) * x0


def _log_snr(path: Path, number: int) -> Tensor:
    """Half the logarithm of the signal-to-noise ratio before a step, the paper's lambda; infinite after the last."""
    return -path.sigmas[number].log()
