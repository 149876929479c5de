"""The noise that published diffusion models were trained with <-> ours. Our config is what NoiseConfig takes.

Sources: diffusers, schedulers/ and their scheduler_config.json; CompVis/stable-diffusion, ldm/models/diffusion/ddpm.py
and make_beta_schedule, whose "linear" is diffusers' "scaled_linear".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.converters.modules import refuse
from zoo.errors import WeightsMismatch

SHAPES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
SAMPLERS = {
    "PNDMScheduler": "pndm",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    "DPMSolverMultistepScheduler": "dpm++2m",
}
BUFFERS = frozenset(
    "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
    "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
    "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2".split()
)


def from_scheduler(config: Mapping) -> dict[str, Any]:
    """A scheduler_config.json of diffusers -> our config of the noise; what it leaves out is as its class has it.
    Raises WeightsMismatch for noise that zoo does not have."""
    kind = config.get("_class_name", "PNDMScheduler")
    refuse(config, {"trained_betas": None}, "noise schedule")
    words = {"shape": (SHAPES, "beta_schedule", "linear"), "prediction": (PREDICTIONS, "prediction_type", "epsilon")}
    found = {}
    for ours, (table, theirs, default) in words.items():
        word = config.get(theirs, default)
        if word not in table:
            raise WeightsMismatch(f"scheduler_config.json says {theirs}={word!r}; zoo has {', '.join(table)}")
        found[ours] = table[word]
    return {
        "steps": config.get("num_train_timesteps", 1000),
        "beta_start": config.get("beta_start", 0.0001),
        "beta_end": config.get("beta_end", 0.02),
        **found,
        "zero_snr": bool(config.get("rescale_betas_zero_snr", False)),
        "offset": config.get("steps_offset", 0),
        "last_alpha_one": bool(config.get("set_alpha_to_one", kind == "DDIMScheduler")),
    }


def to_scheduler(noise: Mapping, sampler: str) -> dict[str, Any]:
    """Our config of the noise and the name of a sampler -> a scheduler_config.json; without such a class that of
    PNDM."""
    kinds = {ours: theirs for theirs, ours in SAMPLERS.items()}
    shapes, predictions = ({ours: theirs for theirs, ours in table.items()} for table in (SHAPES, PREDICTIONS))
    return {
        "_class_name": kinds.get(sampler, "PNDMScheduler"),
        "num_train_timesteps": noise["steps"],
        "beta_start": noise["beta_start"],
        "beta_end": noise["beta_end"],
        "beta_schedule": shapes[noise["shape"]],
        "prediction_type": predictions[noise["prediction"]],
        "rescale_betas_zero_snr": noise["zero_snr"],
        "steps_offset": noise["offset"],
        "set_alpha_to_one": noise["last_alpha_one"],
        "clip_sample": False,
        "skip_prk_steps": True,
        "timestep_spacing": "linspace" if sampler in ("euler", "euler_a", "dpm++2m") else "leading",
    }


def from_betas(betas: Tensor) -> dict[str, Any]:
    """The betas (T,) of a CompVis file -> what they say of our config. Raises WeightsMismatch for another curve than
    those of latent diffusion."""
    # Three digits, which is what configs say and half precision leaves.
    start, end = (float(f"{float(beta):.3g}") for beta in (betas[0], betas[-1]))
    said = {"steps": len(betas), "beta_start": start, "beta_end": end}
    for shape in ("scaled_linear", "linear"):
        if torch.allclose(betas_of(said | {"shape": shape}), betas.double(), rtol=0.01, atol=0):
            return said | {"shape": shape}
    raise WeightsMismatch(
        f"the betas in these weights, {start:g} to {end:g}, are of no schedule that zoo knows from such files: give "
        "the model as a folder of diffusers with its scheduler, or take them out if the card says what is right"
    )


def betas_of(noise: Mapping) -> Tensor:
    """(T,) in fp64, by CompVis's make_beta_schedule."""
    power = 0.5 if noise["shape"] == "scaled_linear" else 1.0
    ends = noise["beta_start"] ** power, noise["beta_end"] ** power
    return torch.linspace(*ends, noise["steps"], dtype=torch.float64) ** (1 / power)
