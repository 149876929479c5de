"""A VQGAN as a first stage equals diffusers': encoding does not quantise, decoding does."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
from diffusers import VQModel
from torch import Tensor, nn

from zoo.models.clip import TextConfig
from zoo.models.kl_vae import KlVae, KlVaeConfig, sample_moments
from zoo.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from zoo.models.unet import UNetConfig
from zoo.models.vq_latents import VqLatents, build_vae, vae_config
from zoo.models.vqgan import VqganConfig

TINY = VqganConfig(
    size=32, widths=(16, 24, 32), blocks=1, attention=(), latent=3, vocab=20, code_width=3, groups=4
)  # fmt: skip
RULES = [
    (r"down_blocks\.(\d+)\.", r"down.\1."),
    (r"up_blocks\.(\d+)\.", lambda m: f"up.{2 - int(m[1])}."),
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


@pytest.fixture(scope="module")
def original() -> VQModel:
    torch.manual_seed(0)
    model = VQModel(
        block_out_channels=TINY.widths,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=TINY.blocks,
        latent_channels=TINY.latent,
        num_vq_embeddings=TINY.vocab,
        norm_num_groups=TINY.groups,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.12)
    return model.eval()


@pytest.fixture(scope="module")
def ours(original) -> VqLatents:
    state: dict[str, Tensor] = {}
    for name, tensor in original.state_dict().items():
        for pattern, new in RULES:
            name = re.sub(pattern, new, name)
        state[name] = tensor[..., None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
    model = VqLatents(TINY).eval()
    model.load_state_dict(state)
    return model


@torch.no_grad()
def test_latents_and_pictures_are_those_that_diffusers_gives(original, ours):
    image = torch.rand(2, 3, 32, 24)
    latents = original.encode(2 * image - 1).latents
    torch.testing.assert_close(ours.encode(image), latents, rtol=1e-5, atol=1e-5)
    spread = torch.randn_like(latents) * 0.15  # near several codes
    expected = (original.decode(spread).sample.clamp(-1, 1) + 1) / 2
    assert len(ours.quantize.encode(spread).unique()) > 5
    torch.testing.assert_close(ours.decode(spread), expected, rtol=1e-5, atol=1e-5)
    unquantised = (original.decode(spread, force_not_quantize=True).sample.clamp(-1, 1) + 1) / 2
    assert not torch.allclose(expected, unquantised, atol=1e-3)
    torch.testing.assert_close(ours.reconstruct(image), ours.decode(latents), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_its_moments_have_no_spread(ours):
    image = torch.rand(2, 3, 32, 32)
    drawn = sample_moments(ours.moments(image), torch.randn(2, 3, 8, 8))
    torch.testing.assert_close(drawn, ours.encode(image), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode(image, torch.randn(2, 3, 8, 8)), ours.encode(image), rtol=0, atol=0)
    assert (ours.factor, ours.channels, ours.scale, ours.image_size, ours.grid) == (4, 3, 1.0, 32, 8)


def test_stable_diffusion_learns_over_it(ours):
    config = StableDiffusionConfig(
        text=TextConfig(context=9, vocab=50, width=12, depth=1, heads=2),
        unet=UNetConfig(
            channels=3, out=3, widths=(8, 12), blocks=1, attention=(1,), heads=(2, 2), context=12, groups=4, size=8
        ),
        vae=TINY,
        start=47, end=48, pad=49, window=9,
    )  # fmt: skip
    assert StableDiffusionConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config
    model = StableDiffusion(config)
    assert isinstance(model.vae, VqLatents) and model.image_size == 32
    model = StableDiffusion(config, vae=ours).train()
    noised = []
    model.unet.register_forward_pre_hook(lambda module, given: noised.append(given[0].detach()))
    image = torch.rand(64, 3, 32, 32)
    model(image=image, text=torch.randint(40, (64, 9)))["loss"].backward()
    assert noised[0].shape == (64, 3, 8, 8)
    assert all(p.grad is None for p in ours.parameters())


def test_the_config_tells_which_first_stage_it_is():
    for config, kind in ((TINY, VqLatents), (KlVaeConfig(size=32, widths=(8, 8), groups=4), KlVae)):
        assert vae_config(json.loads(json.dumps(asdict(config)))) == config
        assert type(build_vae(config)) is kind


def test_the_published_sizes_have_the_published_numbers_of_parameters():
    f4 = VqganConfig(widths=(128, 256, 512), attention=(), latent=3, vocab=8192, code_width=3)
    f8 = replace(f4, widths=(128, 256, 256, 512), attention=(3,), latent=4, vocab=16384, code_width=4)
    for config, tensors, parameters in ((f4, 205, 55_322_782), (f8, 299, 67_717_295)):
        with torch.device("meta"):
            state = build_vae(config).state_dict()
        assert len(state) == tensors
        assert sum(tensor.numel() for tensor in state.values()) == parameters
