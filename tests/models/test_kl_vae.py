"""KL-VAE equals diffusers' to rounding; its latents and its loss are the formulas of latent diffusion."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from zoo.errors import SettingsError
from zoo.models.kl_vae import KlVae, KlVaeConfig, sample_moments

TINY = KlVaeConfig(size=32, widths=(16, 24, 32), blocks=1, latent=4, groups=4)


def original(config: KlVaeConfig, std: float = 0.12) -> AutoencoderKL:
    """diffusers' autoencoder of that config, with weights that make much of a picture."""
    levels = len(config.widths)
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=config.widths,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=config.blocks,
        latent_channels=config.latent,
        norm_num_groups=config.groups,
        use_quant_conv=config.quant,
        use_post_quant_conv=config.quant,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.eval()


def renamed(state: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """diffusers' names -> CompVis': the decoder's levels count from the first, matrices are convolutions."""
    up = lambda m: f"up.{levels - 1 - int(m[1])}."  # noqa: E731
    rules = [
        (r"down_blocks\.(\d+)\.", r"down.\1."),
        (r"up_blocks\.(\d+)\.", up),
        (r"mid_block\.resnets\.0", "mid.block_1"),
        (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0\.", "mid.attn_1."),
        (r"resnets", "block"),
        (r"(down|up)samplers\.0", r"\1sample"),
        (r"conv_shortcut", "nin_shortcut"),
        (r"conv_norm_out", "norm_out"),
        (r"group_norm", "norm"),
        (r"to_([qkv])\.", r"\1."),
        (r"to_out\.0", "proj_out"),
    ]
    made = {}
    for name, tensor in state.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        made[name] = tensor[..., None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
    return made


def ours(config: KlVaeConfig, theirs: AutoencoderKL) -> KlVae:
    model = KlVae(config).eval()
    model.load_state_dict(renamed(theirs.state_dict(), len(config.widths)))
    return model


def picture(*size: int) -> Tensor:
    torch.manual_seed(1)
    return torch.rand(2, 3, *size)


@torch.no_grad()
@pytest.mark.parametrize(
    ("changes", "size"),
    [({}, (32, 32)), ({}, (20, 36)), ({"blocks": 2, "latent": 3}, (16, 16)), ({"quant": False}, (32, 32))],
    ids=str,
)
def test_moments_and_pictures_are_those_that_diffusers_gives(changes: dict, size: tuple[int, int]):
    config = replace(TINY, **changes)
    theirs = original(config)
    model, image = ours(config, theirs), picture(*size)
    found = theirs.encode(2 * image - 1).latent_dist
    assert found.mean.std() > 0.05
    torch.testing.assert_close(model.encode(image), found.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.moments(image), found.parameters, rtol=1e-5, atol=1e-5)
    expected = (theirs.decode(found.mean).sample.clamp(-1, 1) + 1) / 2
    assert expected.std() > 0.03
    torch.testing.assert_close(model.decode(found.mean), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.reconstruct(image), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_at_full_size_it_gives_what_diffusers_gives():
    config = KlVaeConfig()
    theirs = original(config, std=0.06)
    model, image = ours(config, theirs), picture(64, 96)
    found = theirs.encode(2 * image - 1).latent_dist
    assert found.mean.std() > 0.05
    torch.testing.assert_close(model.moments(image), found.parameters, rtol=1e-5, atol=1e-5)
    expected = (theirs.decode(found.mean).sample.clamp(-1, 1) + 1) / 2
    assert expected.std() > 0.03
    torch.testing.assert_close(model.decode(found.mean), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_sample_is_the_mean_and_so_many_deviations_of_noise():
    theirs = original(TINY)
    model, image = ours(TINY, theirs), picture(32, 32)
    noise = torch.randn(2, 4, 8, 8)
    found = theirs.encode(2 * image - 1).latent_dist
    torch.testing.assert_close(model.encode(image, noise), found.mean + found.std * noise, rtol=1e-5, atol=1e-5)


def test_the_logarithm_of_the_variance_is_kept_within_the_published_bounds():
    moments = torch.tensor([1.0, 1.0, -1e6, 1e6]).view(1, 4, 1, 1)
    found = sample_moments(moments, torch.ones(1, 2, 1, 1)).flatten().double()
    expected = torch.tensor([1 + torch.exp(torch.tensor(-15.0)), 1 + torch.exp(torch.tensor(10.0))]).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_loss_is_the_published_sum_divided_by_the_pixels():
    model, image = ours(replace(TINY, kl_weight=1e-3), original(TINY)), picture(32, 32)
    moments = model.moments(image).detach().double()
    mean, logvar = moments[:, :4], moments[:, 4:]
    torch.manual_seed(2)
    noise = torch.randn(2, 4, 8, 8)
    latents = mean + (0.5 * logvar).exp() * noise
    drawn = model.decoder(model.post_quant_conv(latents.float())).detach().double()
    # Per picture: absolute differences summed over pixels, and the KL to N(0, 1) summed over latents.
    pixels = (drawn - (2 * image.double() - 1)).abs().sum((1, 2, 3))
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2, 3))
    torch.manual_seed(2)
    found = model(image)
    found["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    found = {name: value.detach() for name, value in found.items()}
    assert found["kl"] == pytest.approx(float(kl.mean()), rel=1e-5)
    assert found["loss"] == pytest.approx(float((pixels + 1e-3 * kl).mean()) / (3 * 32 * 32), rel=1e-5)
    assert found["pixel"] == pytest.approx(float(pixels.mean()) / (3 * 32 * 32), rel=1e-5)
    assert found["std"] == pytest.approx(float(latents.std()), rel=1e-5)
    torch.testing.assert_close(found["image"], drawn.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found["target"], 2 * image - 1)


def test_the_published_sizes_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        model = KlVae(KlVaeConfig())
    state = model.state_dict()
    assert len(state) == 248
    assert sum(tensor.numel() for tensor in state.values()) == 83_653_863
    assert (model.image_size, model.factor, model.grid, model.channels, model.scale) == (512, 8, 64, 4, 0.18215)


def test_sides_that_are_no_multiple_of_the_factor_are_refused():
    with pytest.raises(SettingsError, match="34 x 32 pixels: its sides must be multiples of 4"):
        KlVae(TINY).moments(picture(32, 34))
