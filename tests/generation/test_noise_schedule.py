"""The noise of each timestep is diffusers', number for number, and what is learnt leads back to the clean latents."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch
from diffusers import DDPMScheduler

from zoo.errors import SettingsError
from zoo.generation.noise_schedule import PREDICTIONS, NoiseConfig, NoiseSchedule, x0_of

NAMES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def latents(seed: int, count: int = 5) -> torch.Tensor:
    return torch.randn(count, 4, 3, 2, generator=torch.Generator().manual_seed(seed))


def original(config: NoiseConfig) -> DDPMScheduler:
    return DDPMScheduler(
        num_train_timesteps=config.steps,
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        beta_schedule=NAMES[config.shape],
        rescale_betas_zero_snr=config.zero_snr,
    )


@pytest.mark.parametrize("shape", NAMES)
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("betas", [(0.00085, 0.012), (1e-4, 0.02)])
@pytest.mark.parametrize("steps", [1000, 77])
def test_alphas_are_those_of_diffusers_to_the_last_bit(shape, zero_snr, betas, steps):
    config = NoiseConfig(
        steps=steps, beta_start=betas[0], beta_end=betas[1], shape=shape, zero_snr=zero_snr, prediction="v"
    )
    assert torch.equal(NoiseSchedule(config).alphas, original(config).alphas_cumprod)


def test_alphas_of_stable_diffusion_are_the_products_of_the_formula():
    betas = [(0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t / 999) ** 2 for t in range(1000)]
    wanted = torch.tensor([1 - beta for beta in betas], dtype=torch.float64).cumprod(0)
    alphas = NoiseSchedule(NoiseConfig()).alphas
    torch.testing.assert_close(alphas.double(), wanted, rtol=3e-6, atol=0)
    known = {0: 0.99915, 1: 0.99829603, 499: 0.27766965, 981: 0.0057755, 999: 0.0046601}
    assert {t: alphas[t].item() for t in known} == pytest.approx(known, rel=1e-5)


def test_zero_snr_leaves_nothing_at_the_end_and_the_beginning_as_it_was():
    plain = NoiseSchedule(NoiseConfig()).alphas.double().sqrt()
    rescaled = NoiseSchedule(NoiseConfig(zero_snr=True, prediction="v")).alphas
    assert rescaled[-1] == 0
    wanted = ((plain - plain[-1]) * plain[0] / (plain[0] - plain[-1])) ** 2
    torch.testing.assert_close(rescaled.double(), wanted, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_and_velocity_are_those_of_diffusers_for_a_timestep_per_picture(zero_snr):
    config = NoiseConfig(zero_snr=zero_snr, prediction="v")
    timesteps, x0, noise = torch.tensor([0, 1, 500, 998, 999]), latents(0), latents(1)
    ours, theirs = NoiseSchedule(config), original(config)
    assert torch.equal(ours.add_noise(x0, noise, timesteps), theirs.add_noise(x0, noise, timesteps))
    assert torch.equal(ours.velocity(x0, noise, timesteps), theirs.get_velocity(x0, noise, timesteps))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_leads_back_to_the_clean_latents_and_to_the_noise(prediction):
    schedule = NoiseSchedule(NoiseConfig(prediction=prediction))
    timesteps, x0, noise = torch.tensor([0, 1, 500, 998, 999]), latents(0), latents(1)
    x, output = schedule.add_noise(x0, noise, timesteps), schedule.target(x0, noise, timesteps)
    torch.testing.assert_close(schedule.x0(output, x, timesteps), x0, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(schedule.epsilon(output, x, timesteps), noise, rtol=1e-4, atol=1e-5)
    # One timestep for all, as sampling has it.
    assert torch.equal(schedule.x0(output, x, timesteps)[2], schedule.x0(output, x, torch.tensor(500))[2])


def test_what_is_learnt_is_the_noise_the_velocity_or_the_clean_latents():
    timesteps, x0, noise = torch.tensor([0, 300, 600, 900, 999]), latents(0), latents(1)
    target = {p: NoiseSchedule(NoiseConfig(prediction=p)).target(x0, noise, timesteps) for p in PREDICTIONS}
    alphas = original(NoiseConfig()).alphas_cumprod[timesteps].view(5, 1, 1, 1)
    assert torch.equal(target["epsilon"], noise) and torch.equal(target["sample"], x0)
    torch.testing.assert_close(target["v"], alphas.sqrt() * noise - (1 - alphas).sqrt() * x0)


def test_half_precision_latents_are_computed_in_fp32_and_keep_their_dtype():
    schedule, timesteps = NoiseSchedule(NoiseConfig(prediction="v")), torch.tensor([999, 0, 3, 500, 20])
    x0, noise = latents(0).bfloat16(), latents(1).bfloat16()
    for method in (schedule.add_noise, schedule.velocity, schedule.x0, schedule.epsilon):
        assert torch.equal(method(x0, noise, timesteps), method(x0.float(), noise.float(), timesteps).bfloat16())


def test_weights_of_min_snr_are_the_papers():
    timesteps, gamma = torch.tensor([0, 1, 250, 500, 999]), 5.0
    alphas = original(NoiseConfig()).alphas_cumprod[timesteps].double()
    snr = alphas / (1 - alphas)
    assert (snr > gamma).any() and (snr < gamma).any()
    wanted = {"epsilon": snr.clamp(max=5) / snr, "v": snr.clamp(max=5) / (snr + 1), "sample": snr.clamp(max=5)}
    for prediction, weights in wanted.items():
        schedule = NoiseSchedule(NoiseConfig(prediction=prediction))
        torch.testing.assert_close(schedule.snr(timesteps).double(), snr, rtol=1e-5, atol=0)
        found = schedule.min_snr_weight(timesteps, gamma)
        torch.testing.assert_close(found.double(), weights, rtol=1e-5, atol=0)


def test_min_snr_of_zero_signal_is_a_number_for_v_and_the_noise_is_refused():
    schedule = NoiseSchedule(NoiseConfig(zero_snr=True, prediction="v"))
    assert schedule.min_snr_weight(torch.tensor([999]), 5.0).tolist() == [0.0]
    with pytest.raises(SettingsError, match="zero_snr=True needs prediction='v'"):
        NoiseConfig(zero_snr=True, prediction="epsilon")


def test_the_network_may_predict_at_any_level_of_noise():
    x0, noise, angle = latents(0), latents(1), torch.tensor(0.4)
    signal, sigma = angle.cos(), angle.sin()
    x = signal * x0 + sigma * noise
    for prediction, output in (("epsilon", noise), ("sample", x0), ("v", signal * noise - sigma * x0)):
        torch.testing.assert_close(x0_of(prediction, output, x, signal, sigma), x0)


def test_a_config_comes_back_from_json():
    config = NoiseConfig(steps=500, shape="linear", prediction="v", zero_snr=True, offset=0, last_alpha_one=True)
    assert NoiseConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
    with pytest.raises(TypeError):
        NoiseConfig.from_dict({"beta": 1})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"shape": "scaled"}, "nearest: scaled_linear"),
        ({"prediction": "epsilom"}, "nearest: epsilon"),
        ({"steps": 1}, "steps=1"),
        ({"beta_start": 0.5}, "beta_start=0.5"),
        ({"beta_end": math.inf}, "beta_end=inf"),
    ],
)
def test_unknown_words_and_impossible_numbers_are_refused(words, message):
    with pytest.raises(SettingsError, match=message):
        NoiseConfig(**words)
