"""The UNet equals diffusers' to rounding, and what it says of itself holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from zoo.models.unet import UNet, UNetConfig

TINY = UNetConfig(widths=(16, 24), blocks=1, attention=(0,), heads=(4, 3), context=12, groups=4, size=8)
SHAPES = {
    "convolutions": {},
    "matrices": {"linear": True},
    "two blocks": {"blocks": 2, "attention": (0, 1)},
    "three levels": {"widths": (8, 16, 24), "heads": (2, 2, 3), "attention": (1, 2)},
    "deep attention": {"depth": 2},
    "inpainting": {"channels": 9},
    "no middle": {"mid": False},
    "upcast": {"upcast": True},
}


def original(config: UNetConfig) -> UNet2DConditionModel:
    """diffusers' network of that config, no weight of which is zero."""
    levels = range(len(config.widths))
    kinds = {way: [("CrossAttn" if i in config.attention else "") + way for i in levels] for way in ("Down", "Up")}
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=config.size,
        in_channels=config.channels,
        out_channels=config.out,
        block_out_channels=config.widths,
        layers_per_block=config.blocks,
        down_block_types=[f"{kind}Block2D" for kind in kinds["Down"]],
        up_block_types=[f"{kind}Block2D" for kind in reversed(kinds["Up"])],
        mid_block_type="UNetMidBlock2DCrossAttn" if config.mid else None,
        attention_head_dim=config.heads,  # which it calls the number of heads
        transformer_layers_per_block=config.depth,
        cross_attention_dim=config.context,
        use_linear_projection=config.linear,
        upcast_attention=config.upcast,
        norm_num_groups=config.groups,
    )
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15)
    return model.eval()


def ours(config: UNetConfig, theirs: nn.Module) -> UNet:
    """Ours with the same weights: names are the same, 1x1 convolutions around transformer blocks are matrices."""
    model = UNet(config).eval()
    own = model.state_dict()
    state = {name: w.view_as(own[name]) if ".proj_" in name else w for name, w in theirs.state_dict().items()}
    model.load_state_dict(state)
    return model


def inputs(config: UNetConfig, size: tuple[int, int] = (8, 8)) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, config.channels, *size), torch.tensor([0, 981, 17]), torch.randn(3, 7, config.context)


@torch.no_grad()
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_it_gives_what_diffusers_gives(changes: dict):
    config = replace(TINY, **changes)
    theirs = original(config)
    given = inputs(config)
    expected = theirs(*given).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(config, theirs)(*given), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [(7, 9), (5, 6), (12, 3)], ids=str)
def test_latents_of_odd_sides_come_out_as_diffusers_gives_them(size: tuple[int, int]):
    config = replace(TINY, widths=(8, 16, 24), heads=(2, 2, 3), attention=(0, 2))
    theirs = original(config)
    given = inputs(config, size)
    expected = theirs(*given).sample
    assert expected.shape == (3, 4, *size)
    torch.testing.assert_close(ours(config, theirs)(*given), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_one_timestep_of_all_is_that_of_each():
    model = ours(TINY, original(TINY))
    latents, _, context = inputs(TINY)
    alone, each = (model(latents, torch.tensor(t), context) for t in (17, [17, 17, 17]))
    torch.testing.assert_close(alone, each)


@torch.no_grad()
def test_keys_and_values_computed_before_give_the_same():
    config = replace(TINY, depth=2, attention=(0, 1))
    model = ours(config, original(config))
    latents, timesteps, context = inputs(config)
    expected = model(latents, timesteps, context)
    known = model.keys_values(context)
    torch.testing.assert_close(model(latents, timesteps, known), expected, rtol=0, atol=0)
    assert not torch.allclose(model(latents, timesteps, model.keys_values(context + 1)), expected)


@pytest.mark.parametrize("changes", [SHAPES["two blocks"], SHAPES["no middle"], SHAPES["deep attention"]], ids=str)
def test_computing_activations_again_changes_no_gradient(changes: dict):
    config = replace(TINY, **changes)
    model, found = ours(config, original(config)).train(), []
    for enable in (False, True):
        calls = []
        hook = model.up_blocks[0].resnets[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        latents, timesteps, context = inputs(config)
        model(latents, timesteps, context.requires_grad_()).square().mean().backward()
        found.append([p.grad.clone() for p in (*model.parameters(), context)])
        hook.remove()
        assert len(calls) == (2 if enable else 1)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_fresh_one_predicts_nothing_and_learns():
    torch.manual_seed(0)
    model = UNet(TINY)
    latents, timesteps, context = inputs(TINY)
    found = model(latents, timesteps, context)
    assert not found.any()
    (found - latents).square().mean().backward()
    assert model.conv_out.weight.grad.any()


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (UNetConfig(), 859_520_964),
        (UNetConfig(heads=(5, 10, 20, 20), context=1024, linear=True, upcast=True, size=96), 865_910_724),
        (UNetConfig(channels=9), 859_535_364),
        (UNetConfig(context=1280), 872_300_484),
    ],
    ids=["1.5", "2.1", "1.5 inpainting", "LDM 1.4B"],
)
def test_the_published_sizes_have_the_published_numbers_of_parameters(config: UNetConfig, parameters: int):
    with torch.device("meta"):
        model = UNet(config)
    state = model.state_dict()
    assert len(state) == 686
    assert sum(tensor.numel() for tensor in state.values()) == parameters


def test_its_config_is_what_json_says():
    config = replace(TINY, mid=False)
    written = {name: list(v) if isinstance(v, tuple) else v for name, v in vars(config).items()}
    assert UNetConfig.from_dict(written) == config


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"heads": (5, 10, 20, 20), "context": 1024, "linear": True}], ids=["1", "2"])
def test_at_full_size_it_gives_what_diffusers_gives(changes: dict):
    config = replace(UNetConfig(), **changes)
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(
        sample_size=64,
        cross_attention_dim=config.context,
        attention_head_dim=config.heads,
        use_linear_projection=config.linear,
    ).eval()
    model = ours(config, theirs)
    latents, timesteps, context = torch.randn(2, 4, 16, 24), torch.tensor([7, 900]), torch.randn(2, 77, config.context)
    expected = theirs(latents, timesteps, context).sample
    assert (model(latents, timesteps, context) - expected).abs().max() < 1e-5 * expected.abs().max()
