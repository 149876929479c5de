"""Latent diffusion's own text tower equals diffusers' LDMBertModel to rounding, at every token, padding too."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from torch import Tensor, nn

from zoo.errors import SettingsError
from zoo.models.kl_vae import KlVaeConfig
from zoo.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from zoo.models.text_encoder import LdmTextConfig, LdmTextEncoder, build_text, text_config
from zoo.models.unet import UNetConfig

TINY = LdmTextConfig(context=9, vocab=60, width=24, depth=3, heads=2, head_width=8)  # heads together narrower: 16
WIDER = LdmTextConfig(context=9, vocab=60, width=12, depth=2, heads=4, head_width=8)  # and wider, 32
PUBLISHED = LdmTextConfig()
TOKENS = torch.tensor([[57, 3, 9, 7, 8, 4, 6, 5, 58], [57, 3, 58, 0, 0, 0, 0, 0, 0]])


def their_tower(config: LdmTextConfig) -> LDMBertModel:
    sizes = LDMBertConfig(
        vocab_size=config.vocab,
        max_position_embeddings=config.context,
        encoder_layers=config.depth,
        encoder_ffn_dim=4 * config.width,
        encoder_attention_heads=config.heads,
        head_dim=config.head_width,
        d_model=config.width,
    )
    torch.manual_seed(0)
    model = LDMBertModel(sizes)
    for name, parameter in model.model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm.weight" in name else 0.0, 4 * config.width**-0.5 / 5)
    return model.eval()


def our_tower(config: LdmTextConfig, theirs: LDMBertModel) -> LdmTextEncoder:
    """With their weights, each put where it belongs by hand."""
    with torch.device("meta"):
        tower = LdmTextEncoder(config).eval()
    model = theirs.model
    state = {"embed.weight": model.embed_tokens.weight, "positions": model.embed_positions.weight}
    state |= {f"norm_out.{name}": tensor for name, tensor in model.layer_norm.named_parameters()}
    for number, layer in enumerate(model.layers):
        attention = layer.self_attn
        qkv = [part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
        state[f"blocks.{number}.attention.qkv.weight"] = torch.cat(qkv)
        for ours, part in (
            ("attention.out", attention.out_proj),
            *(("norm1", layer.self_attn_layer_norm), ("norm2", layer.final_layer_norm)),
            *(("mlp.up", layer.fc1), ("mlp.down", layer.fc2)),
        ):
            state |= {f"blocks.{number}.{ours}.{name}": tensor for name, tensor in part.named_parameters()}
    tower.load_state_dict({name: tensor.detach() for name, tensor in state.items()}, assign=True)
    return tower


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, WIDER], ids=["narrow heads", "wide heads"])
@torch.no_grad()
def test_it_gives_the_context_that_diffusers_gives(config: LdmTextConfig):
    theirs = their_tower(config)
    ours = our_tower(config, theirs)
    assert ours.width == config.width
    assert_close(ours(TOKENS), theirs(TOKENS).last_hidden_state)


@pytest.mark.parametrize("skip", [1, 2])
@torch.no_grad()
def test_blocks_that_are_skipped_are_the_last_ones_and_the_norm_stays(skip: int):
    theirs = their_tower(TINY)
    state = theirs(TOKENS, output_hidden_states=True).hidden_states[TINY.depth - skip]
    norm = theirs.model.layer_norm
    assert_close(our_tower(TINY, theirs)(TOKENS, skip), F.layer_norm(state, (24,), norm.weight, norm.bias, 1e-5))


@torch.no_grad()
def test_padding_is_read_and_tokens_see_what_comes_after_them():
    tower = our_tower(TINY, their_tower(TINY))
    whole, cut = tower(TOKENS[1:]), tower(TOKENS[1:, :3])
    assert (whole[:, :3] - cut).abs().max() > 0.01
    changed = TOKENS[1:].clone()
    changed[0, -1] = 5
    assert (tower(changed)[0, 0] - whole[0, 0]).abs().max() > 0.01


def test_what_it_cannot_do_is_refused():
    tower = LdmTextEncoder(TINY)
    with pytest.raises(SettingsError, match="10 tokens, and this text tower reads 9"):
        tower(torch.zeros(1, 10, dtype=torch.int64))
    with pytest.raises(SettingsError, match="skip=3: this text tower has 3 blocks"):
        tower(TOKENS, skip=3)


def test_the_config_tells_that_it_is_this_tower():
    assert text_config(asdict(TINY)) == TINY
    assert type(build_text(TINY)) is LdmTextEncoder
    config = StableDiffusionConfig(text=TINY)
    assert StableDiffusionConfig.from_dict(asdict(config)) == config


@pytest.mark.parametrize(("width", "parameters"), [(640, 166_590_080), (1280, 542_895_360)])
def test_the_published_sizes_have_their_numbers_of_parameters(width: int, parameters: int):
    """Words and places, a last norm, and 32 blocks: two norms, 8 heads of 64, of which only what joins them has biases,
    and two layers of four times the width."""
    block = 2 * 2 * width + 3 * width * 512 + 512 * width + width + 2 * width * 4 * width + 4 * width + width
    assert (30522 + 77) * width + 2 * width + 32 * block == parameters
    with torch.device("meta"):
        tower = build_text(LdmTextConfig(width=width))
    assert sum(parameter.numel() for parameter in tower.parameters()) == parameters


def test_it_learns_together_with_the_unet_and_only_if_it_is_asked_to():
    torch.manual_seed(0)
    unet = UNetConfig(widths=(8, 16), blocks=1, attention=(1,), heads=(1, 2), context=24, groups=4, size=4)
    vae = KlVaeConfig(size=8, widths=(8, 8), blocks=1, groups=4)
    ends = {"start": 57, "end": 58, "pad": 0, "window": 9, "caption_dropout": 0.0}
    model = StableDiffusion(StableDiffusionConfig(text=TINY, unet=unet, vae=vae, **ends))
    batch = {"moments": torch.randn(2, 8, 4, 4), "text": TOKENS}
    model.train()(**batch)["loss"].backward()
    assert all(parameter.grad is None for parameter in model.text.parameters())
    model.text.requires_grad_(True)
    nn.init.normal_(model.unet.conv_out.weight)  # zero at the beginning, as published
    for name, parameter in model.unet.named_parameters():
        if name.endswith(("proj_out.weight", "to_out.0.weight")):
            nn.init.normal_(parameter)
    model.train()(**batch)["loss"].backward()
    still = [name for name, p in model.text.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not still and model.text.training


@pytest.mark.slow
@torch.no_grad()
def test_the_largest_gives_the_context_that_diffusers_gives():
    theirs = their_tower(PUBLISHED)
    tokens = torch.tensor([[101, 1037, 4169, 1997, 1037, 6847, 19763, 102] + [0] * 69])
    assert_close(our_tower(PUBLISHED, theirs)(tokens), theirs(tokens).last_hidden_state)
