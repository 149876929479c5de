"""Samplers of diffusion models: from noise to latents by asking a network again and again how much of it is noise.

A sampler is a row of `SAMPLERS`: where it asks, and one step of it. Numbers are diffusers' unless told otherwise. B
batch, N steps, T timesteps that the network was trained with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from zoo.errors import SettingsError, nearest
from zoo.generation.noise_schedule import NoiseSchedule
from zoo.generation.sampler_steps import MEMORY, Path, Step, ddim, ddpm, dpm_2m, euler, euler_a, pndm

Predict = Callable[[Tensor, Tensor], Tensor]
OnStep = Callable[[int, Tensor, Tensor], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """`step`: one step. `spacing`: of its timesteps, if none is asked for. `sigmas`: it counts in sigmas; `exploding`:
    its latents are x0 + sigma noise, and its timesteps need not be whole; `extra`: so many more timesteps are laid out,
    and the least noisy left out. `karras`, `compvis`: what it has. `random`: it draws noise at each step.
    """

    step: Step
    spacing: str = "leading"
    sigmas: bool = False
    exploding: bool = False
    extra: int = 0
    karras: bool = False
    compvis: bool = False
    random: bool = False


SAMPLERS = {
    "ddim": Sampler(step=ddim, compvis=True),
    "ddpm": Sampler(step=ddpm, random=True),
    "pndm": Sampler(step=pndm, compvis=True),
    "plms": Sampler(step=pndm, compvis=True),  # CompVis' name for it
    "euler": Sampler(step=euler, spacing="linspace", sigmas=True, exploding=True, karras=True, compvis=True),
    "euler_a": Sampler(step=euler_a, spacing="linspace", sigmas=True, exploding=True, compvis=True, random=True),
    "dpm++2m": Sampler(step=dpm_2m, spacing="linspace", sigmas=True, extra=1, karras=True),
}
SPACINGS = ("leading", "trailing", "linspace")
CONVENTIONS = ("diffusers", "compvis")


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """How latents are drawn. Raises SettingsError.

    `sampler`: a name of SAMPLERS. `steps`: N; PNDM asks once more. `spacing`: how the timesteps lie (Lin et al. 2023,
    table 2), None for the sampler's own way. `karras`: sigmas as in Karras et al. 2022, equation 5. `eta`: of DDIM,
    from 0, no noise, to 1, that of DDPM. `convention`: "compvis" for the numbers of CompVis' samplers and k-diffusion,
    where they differ from those of diffusers.
    """

    sampler: str = "ddim"
    steps: int = 50
    spacing: str | None = None
    karras: bool = False
    eta: float = 0.0
    convention: str = "diffusers"

    def __post_init__(self) -> None:
        for name, known in (("sampler", SAMPLERS), ("spacing", SPACINGS), ("convention", CONVENTIONS)):
            word = getattr(self, name)
            if word not in known and not (name == "spacing" and word is None):
                raise SettingsError(f"no {name} {word!r}; {nearest(str(word), known)}")
        row, compvis = SAMPLERS[self.sampler], self.convention == "compvis"
        if self.steps < 1:
            raise SettingsError(f"steps={self.steps!r}: give 1 or more")
        if self.karras and not row.karras:
            raise SettingsError(f"karras=True: {self.sampler} has no such sigmas; {_who('karras')} have")
        if not 0 <= self.eta <= 1 or (self.eta and self.sampler != "ddim"):
            raise SettingsError(f"eta={self.eta!r}: give a number from 0 to 1, for ddim only")
        if compvis and not row.compvis:
            raise SettingsError(f"convention='compvis' is not known for {self.sampler}; it is for {_who('compvis')}")
        if compvis and self.spacing is not None:
            raise SettingsError(f"spacing={self.spacing!r}: convention='compvis' has its own")

    @property
    def random(self) -> bool:
        """Whether noise is drawn on the way, and not only at its beginning."""
        return SAMPLERS[self.sampler].random or self.eta > 0


def _who(feature: str) -> str:
    return ", ".join(name for name, row in SAMPLERS.items() if getattr(row, feature))


def timesteps(schedule: NoiseSchedule, config: SamplerConfig) -> Tensor:
    """What the network is told at each step, in order: (N,) int64, or float32 for Euler. PNDM's second stands twice."""
    return _path(schedule, config).timesteps


def strength_start(config: SamplerConfig, strength: float) -> int:
    """The first step of img2img: 0 at strength 1, where nothing is left of the picture; no step remains at 0.

    PNDM counts likewise in its list of N + 1, as in diffusers' pipeline, so there one more step is gone.
    """
    if not 0 <= strength <= 1:
        raise SettingsError(f"strength={strength!r}: give a number from 0 to 1")
    return config.steps - int(config.steps * strength)


def noised(x0: Tensor, noise: Tensor, schedule: NoiseSchedule, config: SamplerConfig, start: int) -> Tensor:
    """x0 with the noise that `sample` expects before step `start`; x0 itself after the last step."""
    path = _path(schedule, config, start)
    if start == len(path.timesteps):
        return x0
    if path.sigmas is None:
        return schedule.add_noise(x0, noise, path.timesteps[start])
    signal, sigma = path.roots(start)
    x = signal * x0.float() + sigma * noise.float()
    return (x if start else x / _initial(path, config)).to(x0.dtype)


def sample(
    predict: Predict,
    latents: Tensor,
    schedule: NoiseSchedule,
    config: SamplerConfig,
    *,
    noise: Callable[[], Tensor] | None = None,
    start: int = 0,
    on_step: OnStep | None = None,
    progress: bool = False,
) -> Tensor:
    """Latents (B, C, h, w): standard normal noise, or for `start` > 0 what `noised` gave -> latents without noise.

    `predict(x, timestep)` -> the network's output, `x` scaled as the network wants it, `timestep` 0-dimensional on the
    latents' device. `noise()` -> fresh standard normal noise (B, C, h, w), which the random samplers need. `on_step(
    number, timestep, latents)` is told the latents after each step, numbered as `start` is, and may give others to go
    on with, as noisy as `noised` makes them for `number + 1`. `progress`: a bar, if it takes over two seconds.

    Steps are computed in fp32, and the latents keep their dtype between them.
    """
    if config.random and noise is None:
        raise SettingsError(f"{config.sampler} draws fresh noise at each step: give noise=")
    path, step, dtype = _path(schedule, config, start), SAMPLERS[config.sampler].step, latents.dtype
    told = path.timesteps.to(latents.device)
    if start == 0:
        latents = (latents.float() * _initial(path, config)).to(dtype)
    history = []
    for number in tqdm(range(start, len(told)), "steps", disable=not progress, delay=2, leave=False):
        scaled = latents / (path.sigmas[number] ** 2 + 1) ** 0.5 if path.exploding else latents
        output = predict(scaled, told[number])
        history = [*history[1 - MEMORY :], (output.float(), latents.float())]
        latents = step(path, number, history, noise).to(dtype)
        others = None if on_step is None else on_step(number, told[number], latents)
        latents = latents if others is None else others
    return latents


def _initial(path: Path, config: SamplerConfig) -> float | Tensor:
    """What standard normal noise is multiplied with before the first step."""
    if not path.exploding:
        return 1.0
    largest = path.sigmas.max()
    # diffusers' latents hold the signal's variance too, but not where the spacing begins at the last timestep.
    return (largest**2 + 1) ** 0.5 if config.spacing == "leading" else largest


def _path(schedule: NoiseSchedule, config: SamplerConfig, start: int = 0) -> Path:
    row, steps, noise = SAMPLERS[config.sampler], config.steps, schedule.config
    compvis = config.convention == "compvis"
    if steps > noise.steps:
        raise SettingsError(f"steps={steps}: the network knows {noise.steps} timesteps, so give at most as many")
    spaced = _spaced(noise.steps, noise.offset, config, row)
    if (spaced < 0).any() or spaced[0] >= noise.steps:
        raise SettingsError(
            f"steps={steps} of {config.sampler} asks at timestep {spaced[0]:g} of {noise.steps}: take other steps"
        )
    sigmas = None
    if row.sigmas:
        spaced, sigmas = _sigmas(schedule, spaced, config, row)
    elif row.step is pndm:
        spaced = np.insert(spaced, 1, spaced[1:2])
    if not 0 <= start <= len(spaced):
        raise SettingsError(f"start={start}: {config.sampler} has {len(spaced)} steps")
    return Path(
        schedule=schedule,
        timesteps=torch.from_numpy(spaced.astype(np.float32 if row.exploding else np.int64)),
        sigmas=None if sigmas is None else torch.from_numpy(sigmas),
        stride=noise.steps // steps,
        start=start,
        eta=config.eta,
        last_alpha=torch.tensor(1.0) if noise.last_alpha_one and not compvis else schedule.alphas[0],
        exploding=row.exploding,
        draws_last=not compvis,
    )


def _spaced(count: int, offset: int, config: SamplerConfig, row: Sampler) -> np.ndarray:
    """The timesteps as the spacing lays them out, (N,) fp64, falling, from `count` of them."""
    spacing, steps = config.spacing or row.spacing, config.steps
    laid = steps + row.extra
    if config.convention == "compvis":
        if row.exploding:
            return np.linspace(count - 1, 0, steps)
        return np.arange(0, count, count // steps)[::-1] + 1.0  # not N of them where N does not divide T
    if spacing == "leading":
        spaced = np.arange(laid)[::-1] * (count // laid) + float(offset)
    elif spacing == "trailing":
        spaced = np.arange(count, 0, -count / steps).round() - 1
    else:
        spaced = np.linspace(0, count - 1, laid)[::-1]
        spaced = spaced if row.exploding else spaced.round()
    return spaced[:steps]  # trailing: rounding gives some N a further timestep, -1


def _sigmas(
    schedule: NoiseSchedule, spaced: np.ndarray, config: SamplerConfig, row: Sampler
) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps (N,) and sigmas (N + 1,) fp32, the last 0."""
    alphas = schedule.alphas.clone()
    if schedule.config.zero_snr:
        alphas[-1] = 2**-24  # diffusers': the first sigma is 4096 and not infinite
    table = (((1 - alphas) / alphas) ** 0.5).numpy()
    logs, places = np.log(table), np.arange(len(table))
    if config.convention == "compvis":
        sigmas = np.exp(np.interp(spaced, places, logs))
    else:
        sigmas = np.interp(spaced.astype(np.float32), places, table)
    if config.karras:
        # diffusers' DPM++ takes the ends of all sigmas, its Euler those of the ones laid out.
        high, low = (sigmas[0], sigmas[-1]) if row.exploding else (table[-1].item(), table[0].item())
        sigmas = (high ** (1 / 7) + np.linspace(0, 1, config.steps) * (low ** (1 / 7) - high ** (1 / 7))) ** 7
        spaced = _timesteps_of(sigmas, logs)
        if not row.exploding and schedule.config.shape != "cosine":
            spaced = spaced.round()
    sigmas = np.append(sigmas, 0).astype(np.float32)
    if not (np.diff(sigmas) < 0).all():
        raise SettingsError(f"steps={config.steps}: two steps of {config.sampler} have one sigma; take fewer")
    return spaced, sigmas


def _timesteps_of(sigmas: np.ndarray, logs: np.ndarray) -> np.ndarray:
    """Where sigmas lie among those of all timesteps, whose logarithms `logs` are; linear in the logarithm between."""
    wanted = np.log(sigmas)
    low = (np.searchsorted(logs, wanted, side="right") - 1).clip(0, len(logs) - 2)
    return low + ((wanted - logs[low]) / (logs[low + 1] - logs[low])).clip(0, 1)
