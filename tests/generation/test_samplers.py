"""Each sampler gives what diffusers' scheduler of that name gives, step by step; some numbers stand here without it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from torch import Tensor

from zoo.errors import SettingsError
from zoo.generation.noise_schedule import NoiseConfig, NoiseSchedule
from zoo.generation.samplers import SAMPLERS, SamplerConfig, noised, sample, strength_start, timesteps

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers

ORIGINALS = {
    "ddim": DDIMScheduler,
    "ddpm": DDPMScheduler,
    "pndm": PNDMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "dpm++2m": DPMSolverMultistepScheduler,
}
DEFAULTS = {"ddim": "leading", "ddpm": "leading", "pndm": "leading"}  # and linspace, of the others
STEPS = (1, 2, 10, 15, 20, 25, 30, 50)


def original(noise: NoiseConfig, config: SamplerConfig):
    """The scheduler of diffusers, as Stable Diffusion sets it."""
    names = {"epsilon": "epsilon", "v": "v_prediction"}
    betas = {"beta_start": noise.beta_start, "beta_end": noise.beta_end, "beta_schedule": noise.shape}
    spaced = {"timestep_spacing": config.spacing} if config.spacing else {}
    own = {
        "ddim": {"clip_sample": False, "set_alpha_to_one": noise.last_alpha_one},
        "ddpm": {"clip_sample": False},
        "pndm": {"skip_prk_steps": True, "set_alpha_to_one": noise.last_alpha_one},
        "euler": {"use_karras_sigmas": config.karras},
        "dpm++2m": {"use_karras_sigmas": config.karras},
    }.get(config.sampler, {})
    if config.sampler != "pndm":
        own["rescale_betas_zero_snr"] = noise.zero_snr
    scheduler = ORIGINALS[config.sampler](
        **betas, **spaced, **own, prediction_type=names[noise.prediction], steps_offset=noise.offset
    )
    scheduler.set_timesteps(config.steps)
    return scheduler


def predictor(prediction: str) -> Callable[[Tensor, Tensor], Tensor]:
    """What the best network would say of pictures normally distributed about 0.3, and a little of its own.

    `x` has variance 1 or so, `t` may be a fraction.
    """

    def predict(x: Tensor, t: Tensor) -> Tensor:
        alpha = torch.exp(-((t.double() / 1000) ** 2) * 4.4 - t.double() / 1200 - 0.001).float()
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        x0 = 0.3 + signal * 0.25 / (alpha * 0.25 + 1 - alpha) * (x - signal * 0.3) + 0.05 * torch.sin(3 * x)
        epsilon = (x - signal * x0) / sigma
        return epsilon if prediction == "epsilon" else signal * epsilon - sigma * x0

    return predict


def normal(seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(2, 4, 3, 3, generator=generator)


def original_steps(noise: NoiseConfig, config: SamplerConfig, latents: Tensor, start: int) -> tuple[list, list]:
    """(what the network was told, the latents after each step), as the pipelines of diffusers loop."""
    scheduler, predict, generator = original(noise, config), predictor(noise.prediction), torch.Generator()
    generator.manual_seed(9)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    told, seen = scheduler.timesteps[start:], []
    own = {"eta": config.eta, "generator": generator} if config.sampler == "ddim" else {}
    if config.sampler in ("ddpm", "euler_a"):
        own = {"generator": generator}
    for t in told:
        output = predict(scheduler.scale_model_input(latents, t), t)
        latents = scheduler.step(output, t, latents, **own).prev_sample
        seen.append(latents)
    return told.tolist(), seen


def our_steps(noise: NoiseConfig, config: SamplerConfig, latents: Tensor, start: int) -> tuple[list, list]:
    told, seen, fresh = [], [], normal(9)

    def on_step(number, timestep, latents):
        assert number == start + len(seen)
        told.append(timestep.item())
        seen.append(latents)

    schedule = NoiseSchedule(noise)
    given = {"noise": lambda: next(fresh), "start": start, "on_step": on_step}
    last = sample(predictor(noise.prediction), latents, schedule, config, **given)
    assert torch.equal(last, seen[-1])
    return told, seen


def assert_equal_steps(noise: NoiseConfig, config: SamplerConfig, start: int = 0, latents=None, theirs=None) -> None:
    """`theirs`: the latents that diffusers begins with, if not as many times ours as its scheduler says."""
    latents = next(normal(3)) if latents is None else latents
    theirs = latents * original(noise, config).init_noise_sigma if theirs is None else theirs
    wanted_told, wanted = original_steps(noise, config, theirs, start)
    told, seen = our_steps(noise, config, latents, start)
    assert told == wanted_told
    for number, (ours, its) in enumerate(zip(seen, wanted, strict=True)):
        assert ours.dtype == its.dtype and its.isfinite().all()
        off = ((ours - its).abs().max() / its.abs().max()).item()
        # Two steps from nothing but noise to none: the numbers that cancel out are 15 times those that are left.
        assert off < (2e-5 if config.steps <= 2 else 1e-5), (
            f"{config} {noise}: step {number} of {len(seen)} is off by {off:.1e}"
        )


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("spacing", [None, "leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", ORIGINALS)
def test_every_step_is_that_of_diffusers(sampler, spacing, prediction):
    for steps in STEPS if spacing else (20,):
        assert_equal_steps(
            NoiseConfig(prediction=prediction), SamplerConfig(sampler=sampler, steps=steps, spacing=spacing)
        )


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("sampler", ["euler", "dpm++2m"])
def test_every_step_on_karras_sigmas_is_that_of_diffusers(sampler, spacing, prediction):
    for steps in STEPS:
        assert_equal_steps(
            NoiseConfig(prediction=prediction),
            SamplerConfig(sampler=sampler, steps=steps, spacing=spacing, karras=True),
        )


@pytest.mark.parametrize("sampler", ORIGINALS)
def test_the_published_offset_and_last_alpha_matter_as_in_diffusers(sampler):
    for offset, last_alpha_one, steps in ((0, False, 10), (0, True, 15), (1, True, 10), (3, False, 25)):
        noise = NoiseConfig(offset=offset, last_alpha_one=last_alpha_one, shape="linear", beta_start=1e-4)
        assert_equal_steps(noise, SamplerConfig(sampler=sampler, steps=steps, spacing="leading"))


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_with_noise_is_that_of_diffusers(spacing, eta):
    for steps in STEPS:
        config = SamplerConfig(steps=steps, spacing=spacing, eta=eta)
        assert_equal_steps(NoiseConfig(last_alpha_one=steps == 10), config)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "euler", "euler_a", "dpm++2m"])
def test_sampling_from_zero_snr_is_that_of_diffusers(sampler):
    for steps in (1, 2, 10, 25):
        config = SamplerConfig(sampler=sampler, steps=steps, spacing="trailing")
        assert_equal_steps(NoiseConfig(prediction="v", zero_snr=True), config)
    assert timesteps(NoiseSchedule(NoiseConfig(prediction="v", zero_snr=True)), config)[0] == 999


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("strength", [0.3, 0.55, 0.8, 1.0])
@pytest.mark.parametrize("sampler", ORIGINALS)
def test_image_to_image_begins_where_diffusers_does(sampler, strength, karras):
    if karras and not SAMPLERS[sampler].karras:
        return
    noise, x0, fresh = NoiseConfig(), 0.4 * next(normal(5)), next(normal(6))
    for spacing, steps in (("leading", 20), ("trailing", 15), ("linspace", 10)):
        config = SamplerConfig(sampler=sampler, steps=steps, spacing=spacing, karras=karras)
        # StableDiffusionImg2ImgPipeline.get_timesteps
        scheduler, kept = original(noise, config), min(int(steps * strength), steps)
        begin = max(steps - kept, 0) * scheduler.order
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        theirs = scheduler.add_noise(x0, fresh, scheduler.timesteps[begin : begin + 1])
        start = strength_start(config, strength)
        ours = noised(x0, fresh, NoiseSchedule(noise), config, start)
        assert start == begin
        if start:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        assert_equal_steps(noise, config, start, ours, theirs)


@pytest.mark.parametrize("sampler", ORIGINALS)
def test_noised_latents_are_those_between_two_steps(sampler):
    """A network that knows x0 keeps the latents where `noised` puts them: what is painted in may be put back."""
    schedule, x0, fresh = NoiseSchedule(NoiseConfig(prediction="sample", last_alpha_one=True)), *pair()
    config = SamplerConfig(sampler=sampler, steps=10)
    seen = []
    given = {"on_step": lambda number, timestep, latents: seen.append(latents), "noise": lambda: fresh}
    begun = noised(x0, fresh, schedule, config, 0)
    last = sample(lambda x, t: x0, begun, schedule, config, **given)
    torch.testing.assert_close(last, x0, rtol=1e-3, atol=1e-5)
    assert noised(x0, fresh, schedule, config, len(seen)) is x0
    if not SAMPLERS[sampler].random:
        for number, latents in enumerate(seen[:-1]):
            torch.testing.assert_close(latents, noised(x0, fresh, schedule, config, number + 1), rtol=1e-3, atol=1e-3)


def pair() -> tuple[Tensor, Tensor]:
    return next(normal(5)), next(normal(6))


def test_timesteps_known_by_heart():
    schedule = NoiseSchedule(NoiseConfig())

    def told(**words) -> list:
        return timesteps(schedule, SamplerConfig(**words)).tolist()

    assert told(steps=50) == list(range(981, 0, -20)) and told(steps=20) == list(range(951, 0, -50))
    assert told(steps=30) == list(range(958, 0, -33))
    assert told(steps=50, spacing="trailing") == list(range(999, 0, -20))
    assert told(sampler="pndm") == [981, 961, *range(961, 0, -20)] and len(told(sampler="plms")) == 51
    assert told(sampler="pndm", steps=20)[:4] == [951, 901, 901, 851]
    twenty = told(sampler="dpm++2m", steps=20)
    assert twenty[:3] + twenty[-2:] == [999, 949, 899, 100, 50]
    assert told(sampler="dpm++2m", steps=20, spacing="leading") == list(range(941, 47, -47))
    karras = [999, 962, 921, 876, 827, 772, 710, 640, 561, 474, 380, 285, 197, 123, 69, 35, 15, 6, 2, 0]
    assert told(sampler="dpm++2m", steps=20, karras=True) == karras
    assert told(steps=30, convention="compvis") == list(range(991, 0, -33)) and len(range(991, 0, -33)) == 31
    assert timesteps(schedule, SamplerConfig()).dtype == torch.int64
    assert timesteps(schedule, SamplerConfig(sampler="euler")).dtype == torch.float32


def test_the_number_of_steps_is_what_was_asked_for_where_rounding_would_give_one_more():
    told = timesteps(NoiseSchedule(NoiseConfig()), SamplerConfig(steps=61, spacing="trailing"))
    assert len(told) == 61 and told.min() >= 0


# --- sums of the tests of diffusers, which need none of it: its dummy model on its dummy latents, ten steps -----------
DUMMY = (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
LINEAR = {"shape": "linear", "beta_start": 1e-4, "beta_end": 0.02, "offset": 0, "last_alpha_one": True}


def dummy_model(x: Tensor, t: Tensor) -> Tensor:
    return x * t / (t + 1)


@pytest.mark.parametrize(
    ("words", "total"),
    [
        ({}, 172.0067),
        ({"prediction": "v"}, 52.5302),
        ({"beta_start": 0.01}, 149.8295),
        ({"beta_start": 0.01, "last_alpha_one": False}, 149.0784),
    ],
)
def test_sums_of_ddim(words, total):
    schedule = NoiseSchedule(NoiseConfig(**LINEAR | words))
    assert sample(dummy_model, DUMMY, schedule, SamplerConfig(steps=10)).abs().sum().item() == pytest.approx(
        total, 1e-6
    )


@pytest.mark.parametrize(
    ("words", "total"), [({}, 10.0807), ({"karras": True}, 124.5230), ({"sampler": "a"}, 152.3192)]
)
def test_sums_of_euler(words, total):
    """Those tests go on from the latents as scaled for the network, so here each step's latents are scaled too."""
    alphas = (1 - torch.linspace(1e-4, 0.02, 1100)).cumprod(0)  # fp32, as the tests had them
    sigmas = (((1 - alphas) / alphas) ** 0.5).double()
    places = torch.linspace(1099, 0, 10, dtype=torch.float64)
    low = places.floor().long().clamp(max=1098)
    laid = torch.lerp(sigmas[low], sigmas[low + 1], places - low)
    if "karras" in words:
        ends = laid[0] ** (1 / 7), laid[-1] ** (1 / 7)
        laid = torch.stack([(ends[0] + i / 9 * (ends[1] - ends[0])) ** 7 for i in range(10)])
    scales = [*((laid**2 + 1) ** 0.5).tolist(), 1.0]
    asked, generator = iter(scales), torch.Generator().manual_seed(0)
    config = SamplerConfig(sampler="euler_a" if "sampler" in words else "euler", steps=10, karras="karras" in words)
    last = sample(
        lambda x, t: dummy_model(x * next(asked), t),
        DUMMY / scales[0],
        NoiseSchedule(NoiseConfig(**LINEAR, steps=1100)),
        config,
        noise=lambda: torch.randn(DUMMY.shape, generator=generator),
        on_step=lambda number, t, latents: latents / scales[number + 1],
    )
    assert last.abs().sum().item() == pytest.approx(total, rel=1e-5)


# --- CompVis and k-diffusion, whose loops are written out in fp64 -----------------------------------------------------
ALPHAS = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
EPSILON = predictor("epsilon")


def ddim_to(x: Tensor, epsilon: Tensor, alpha: Tensor, after: Tensor) -> Tensor:
    return after**0.5 * (x - (1 - alpha) ** 0.5 * epsilon) / alpha**0.5 + (1 - after) ** 0.5 * epsilon


def asked(x: Tensor, t: int | float) -> Tensor:
    return EPSILON(x.float(), torch.tensor(t)).double()


def distance(ours: Tensor, wanted: Tensor) -> float:
    return ((ours - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("steps", [30, 7, 50])
def test_ddim_of_compvis(steps):
    told = list(range(0, 1000, 1000 // steps))
    told = [t + 1 for t in told]
    x = next(normal(3)).double()
    for t, after in [*pairwise(reversed(told)), (told[0], 0)]:
        x = ddim_to(x, asked(x, t), ALPHAS[t], ALPHAS[after])
    config = SamplerConfig(steps=steps, convention="compvis")
    # CompVis ends at the alpha of timestep 0, whatever the checkpoint says.
    schedule = NoiseSchedule(NoiseConfig(last_alpha_one=True))
    assert timesteps(schedule, config).tolist() == told[::-1]
    assert distance(sample(EPSILON, next(normal(3)), schedule, config), x) < 2e-5


@pytest.mark.parametrize("steps", [30, 50])
def test_plms_of_compvis(steps):
    told = [t + 1 for t in range(0, 1000, 1000 // steps)][::-1]
    x, old = next(normal(3)).double(), []
    for t, t_next, after in zip(told, [*told[1:], told[-1]], [*told[1:], 0], strict=True):
        e = asked(x, t)
        if not old:
            mean = (e + asked(ddim_to(x, e, ALPHAS[t], ALPHAS[after]), t_next)) / 2
        elif len(old) == 1:
            mean = (3 * e - old[-1]) / 2
        elif len(old) == 2:
            mean = (23 * e - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            mean = (55 * e - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        x = ddim_to(x, mean, ALPHAS[t], ALPHAS[after])
        old.append(e)
    config = SamplerConfig(sampler="plms", steps=steps, convention="compvis")
    assert distance(sample(EPSILON, next(normal(3)), NoiseSchedule(NoiseConfig()), config), x) < 2e-5


@pytest.mark.parametrize("ancestral", [False, True])
def test_euler_of_k_diffusion(ancestral):
    """Few and coarse timesteps: there it shows how sigmas are had between them."""
    alphas = (1 - torch.linspace(0.00085**0.5, 0.3**0.5, 40, dtype=torch.float64) ** 2).cumprod(0)
    logs, told = ((1 - alphas) / alphas).log() / 2, torch.linspace(39, 0, 12, dtype=torch.float64)
    low = told.floor().long().clamp(max=38)
    sigmas = [*torch.lerp(logs[low], logs[low + 1], told - low).exp(), torch.tensor(0.0)]
    fresh, x = normal(9), next(normal(3)).double() * sigmas[0]
    for t, (sigma, after) in zip(told.tolist(), pairwise(sigmas), strict=True):
        x0 = x - sigma * asked(x / (sigma**2 + 1) ** 0.5, t)
        up = min(after, (after**2 * (sigma**2 - after**2) / sigma**2) ** 0.5) if ancestral else 0 * after
        x = x + (x - x0) / sigma * ((after**2 - up**2) ** 0.5 - sigma)
        x = x + up * next(fresh) if ancestral and after > 0 else x
    schedule, off, draws = NoiseSchedule(NoiseConfig(steps=40, beta_end=0.3)), [], []
    for convention in ("compvis", "diffusers"):
        config = SamplerConfig(sampler="euler_a" if ancestral else "euler", steps=12, convention=convention)
        again, drawn = normal(9), []
        noise = lambda again=again, drawn=drawn: drawn.append(0) or next(again)  # noqa: E731
        off.append(distance(sample(EPSILON, next(normal(3)), schedule, config, noise=noise), x))
        draws.append(len(drawn))
    assert off[0] < 2e-5 and off[1] > 1e-4
    assert draws == ([11, 12] if ancestral else [0, 0])


# --- what holds for every sampler -------------------------------------------------------------------------------------
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_are_computed_in_fp32_and_latents_keep_their_dtype(sampler):
    """Half precision loses nothing but the digits of the latents between steps and of what the network gives."""
    schedule, config, told = NoiseSchedule(NoiseConfig()), SamplerConfig(sampler=sampler, steps=8), []

    def predict(x, t):
        told.append((x.dtype, t.dim(), t.dtype))
        return EPSILON(x.bfloat16().float(), t).bfloat16()

    given = [{"noise": lambda fresh=normal(seed): next(fresh), "start": 1} for seed in (9, 9)]  # noqa: B008
    half = next(normal(3)).bfloat16()
    last = sample(predict, half, schedule, config, **given[0])
    kind = torch.float32 if sampler.startswith("euler") else torch.int64
    assert set(told) == {(torch.bfloat16, 0, kind)} and last.dtype == torch.bfloat16
    rounded = {"on_step": lambda number, t, latents: latents.bfloat16().float()}
    assert torch.equal(last.float(), sample(predict, half.float(), schedule, config, **given[1], **rounded))
    assert half.equal(next(normal(3)).bfloat16())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_more_of_the_past_is_kept_than_is_used(sampler):
    alive, most = weakref.WeakSet(), []

    def predict(x, t):
        output = EPSILON(x, t)
        alive.add(output)
        most.append(len(alive))
        return output

    fresh = normal(9)
    config = SamplerConfig(sampler=sampler, steps=20)
    sample(predict, next(normal(3)), NoiseSchedule(NoiseConfig()), config, noise=lambda: next(fresh))
    assert len(most) >= 20 and max(most) <= 6


def test_noise_is_drawn_as_often_as_diffusers_draws_it():
    """DDPM draws none at timestep 0; so a generator that is used on gives the same numbers afterwards."""
    for words, offset, wanted in (
        ({"sampler": "ddpm"}, 0, 9),
        ({"sampler": "ddpm"}, 1, 10),
        ({"sampler": "euler_a"}, 1, 10),
        ({"eta": 0.5}, 0, 10),
        ({"eta": 0.0}, 0, 0),
        ({"sampler": "dpm++2m"}, 0, 0),
    ):
        drawn, fresh = [], normal(9)
        noise = lambda drawn=drawn, fresh=fresh: drawn.append(0) or next(fresh)  # noqa: E731
        schedule, config = NoiseSchedule(NoiseConfig(offset=offset)), SamplerConfig(steps=10, **words)
        sample(EPSILON, next(normal(3)), schedule, config, noise=noise)
        assert len(drawn) == wanted and config.random == (wanted > 0)


def test_from_no_signal_all_noise_may_be_drawn_afresh():
    schedule, v = NoiseSchedule(NoiseConfig(prediction="v", zero_snr=True)), predictor("v")
    for steps in range(1, 30):  # at some of them rounding leaves less than none
        fresh, config = normal(9), SamplerConfig(steps=steps, spacing="trailing", eta=1.0)
        assert sample(v, next(normal(3)), schedule, config, noise=lambda fresh=fresh: next(fresh)).isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_picture_of_a_batch_is_as_it_would_be_alone(sampler):
    schedule, config, fresh = NoiseSchedule(NoiseConfig()), SamplerConfig(sampler=sampler, steps=6), next(normal(9))
    together = sample(EPSILON, next(normal(3)), schedule, config, noise=lambda: fresh)
    alone = sample(EPSILON, next(normal(3))[1:], schedule, config, noise=lambda: fresh[1:])
    assert torch.equal(together[1:], alone)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_latents_given_after_a_step_are_gone_on_with(sampler):
    schedule, config, other = NoiseSchedule(NoiseConfig()), SamplerConfig(sampler=sampler, steps=5), next(normal(4))
    seen, count = [], len(timesteps(schedule, config))
    last = sample(
        lambda x, t: seen.append(x) or EPSILON(x, t),
        next(normal(3)),
        schedule,
        config,
        noise=lambda: torch.zeros_like(other),
        on_step=lambda number, t, latents: other if number in (2, count - 1) else None,
    )
    assert last is other and len(seen) == count
    ratio = seen[3] / other
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio))


def test_a_run_leaves_nothing_behind_for_the_next():
    schedule = NoiseSchedule(NoiseConfig())
    for sampler in SAMPLERS:
        config = SamplerConfig(sampler=sampler, steps=5)
        first, second = (
            sample(EPSILON, next(normal(3)), schedule, config, noise=lambda: torch.ones(2, 4, 3, 3)) for _ in range(2)
        )
        assert torch.equal(first, second)


def test_strength_is_the_share_of_steps_that_are_gone():
    starts = {s: strength_start(SamplerConfig(steps=50), s) for s in (0.0, 0.01, 0.3, 0.75, 0.999, 1.0)}
    assert starts == {0.0: 50, 0.01: 50, 0.3: 35, 0.75: 13, 0.999: 1, 1.0: 0}
    schedule, config, x0 = NoiseSchedule(NoiseConfig()), SamplerConfig(steps=50), next(normal(3))
    assert noised(x0, next(normal(4)), schedule, config, 50) is x0
    assert sample(EPSILON, x0, schedule, config, start=50) is x0
    for strength in (-0.1, 1.1, math.nan):
        with pytest.raises(SettingsError, match="strength="):
            strength_start(config, strength)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"sampler": "dmp++2m"}, r"no sampler 'dmp\+\+2m'; nearest: dpm\+\+2m"),
        ({"sampler": "euler", "spacing": "trail"}, "nearest: trailing"),
        ({"convention": "kdiffusion"}, "no convention 'kdiffusion'"),
        ({"steps": 0}, "steps=0"),
        ({"karras": True}, r"euler, dpm\+\+2m have"),
        ({"sampler": "pndm", "eta": 0.5}, "for ddim only"),
        ({"eta": 1.5}, "from 0 to 1"),
        ({"sampler": "ddpm", "convention": "compvis"}, "not known for ddpm"),
        ({"convention": "compvis", "spacing": "leading"}, "has its own"),
    ],
)
def test_unknown_words_and_settings_that_contradict_are_refused(words, message):
    with pytest.raises(SettingsError, match=message):
        SamplerConfig(**words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"steps": 1001}, "knows 1000 timesteps"),
        ({"steps": 1000}, "at timestep 1000 of 1000"),  # diffusers: IndexError
        ({"steps": 27, "convention": "compvis"}, "at timestep 1000 of 1000"),  # CompVis: IndexError
        ({"sampler": "dpm++2m", "spacing": "leading", "steps": 1000}, "have one sigma"),  # diffusers: not a number
    ],
)
def test_steps_that_the_network_does_not_know_are_refused(words, message):
    with pytest.raises(SettingsError, match=message):
        timesteps(NoiseSchedule(NoiseConfig()), SamplerConfig(**words))


def test_a_random_sampler_without_noise_and_a_start_that_is_not_there_are_refused():
    schedule, x = NoiseSchedule(NoiseConfig()), next(normal(3))
    for words in ({"sampler": "ddpm"}, {"sampler": "euler_a"}, {"eta": 0.1}):
        with pytest.raises(SettingsError, match="give noise="):
            sample(EPSILON, x, schedule, SamplerConfig(**words))
    with pytest.raises(SettingsError, match="start=11: ddim has 10 steps"):
        sample(EPSILON, x, schedule, SamplerConfig(steps=10), start=11)
