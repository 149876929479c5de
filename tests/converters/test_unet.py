"""UNets of diffusers with random weights, in every shape that was published, load strictly and give what they gave;
CompVis's names are those of openaimodel.py, written out here block by block."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from zoo import weights
from zoo.converters.unet import averaged, to_compvis, to_diffusers, to_ours
from zoo.errors import WeightsMismatch
from zoo.models.unet import UNet, UNetConfig

CROSS, PLAIN = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"), ("DownBlock2D", "UpBlock2D")
V1 = {"block_out_channels": (32, 64), "layers_per_block": 2, "cross_attention_dim": 24, "attention_head_dim": 8}
KINDS = {
    "v1": V1,
    "v2": V1 | {"use_linear_projection": True, "attention_head_dim": [2, 4], "upcast_attention": True},
    "inpainting": V1 | {"in_channels": 9},
    "bk-sdm-base": V1 | {"layers_per_block": 1},
    "bk-sdm-tiny": V1 | {"layers_per_block": 1, "mid_block_type": None, "kinds": (CROSS, CROSS)},
    "three levels": V1 | {"block_out_channels": (32, 32, 64), "norm_num_groups": 16, "kinds": (CROSS, PLAIN, CROSS)},
    "deep": V1 | {"transformer_layers_per_block": 2},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def original(kind: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    sizes = dict(KINDS[kind])
    kinds = sizes.pop("kinds", (CROSS, PLAIN))
    down, up = [down for down, _ in kinds], [up for _, up in reversed(kinds)]
    model = UNet2DConditionModel(sample_size=16, down_block_types=down, up_block_types=up, **sizes)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.15)
    return model.eval()


def loaded(state: dict[str, Tensor], config: dict) -> UNet:
    ours, sizes = to_ours(state, config)
    with weights.blank():
        model = UNet(UNetConfig.from_dict(sizes))
    return weights.load(model, ours).eval()


def compvis(state: dict[str, Tensor], levels: int, blocks: int, attention: set[int]) -> dict[str, Tensor]:
    """diffusers' names -> CompVis's, by walking through its constructor: every block gets the next number."""
    prefixes = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    prefixes |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    number = 1
    for level in range(levels):
        for block in range(blocks):
            prefixes[f"down_blocks.{level}.resnets.{block}"] = f"input_blocks.{number}.0"
            prefixes[f"down_blocks.{level}.attentions.{block}"] = f"input_blocks.{number}.1"
            number += 1
        if level < levels - 1:
            prefixes[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    prefixes |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    prefixes |= {"mid_block.resnets.1": "middle_block.2"}
    number = 0
    for level in range(levels):
        for block in range(blocks + 1):
            inside = iter(range(3))
            prefixes[f"up_blocks.{level}.resnets.{block}"] = f"output_blocks.{number}.{next(inside)}"
            if levels - 1 - level in attention:
                prefixes[f"up_blocks.{level}.attentions.{block}"] = f"output_blocks.{number}.{next(inside)}"
            if block == blocks and level < levels - 1:
                prefixes[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{number}.{next(inside)}.conv"
            number += 1
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
    inner |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    made = {}
    for name, tensor in state.items():
        (prefix,) = (prefix for prefix in prefixes if name.startswith(prefix + "."))
        rest = name.removeprefix(prefix)
        if ".resnets." in prefix:
            rest = re.sub(r"^\.(\w+)", lambda m: f".{inner[m[1]]}", rest)
        made[prefixes[prefix] + rest] = tensor
    return made


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], tensor) for name, tensor in b.items())


# --- diffusers -------------------------------------------------------------------------------------------------------
@every_kind
@torch.no_grad()
def test_a_unet_of_diffusers_gives_what_it_gave(kind, tmp_path):
    theirs = original(kind)
    theirs.save_pretrained(tmp_path)
    ours = loaded(weights.read(tmp_path), weights.read_config(tmp_path))
    latents, context = torch.randn(2, theirs.config.in_channels, 16, 8), torch.randn(2, 5, 24)
    timesteps = torch.tensor([3, 981])
    expected = theirs(latents, timesteps, context).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(latents, timesteps, context), expected, atol=1e-5, rtol=1e-4)


@every_kind
def test_diffusers_tensors_and_config_come_back(kind):
    theirs = original(kind)
    back, config = to_diffusers(*to_ours(theirs.state_dict(), dict(theirs.config)))
    assert same(back, theirs.state_dict())
    rebuilt = UNet2DConditionModel.from_config(config)
    rebuilt.load_state_dict(back)
    changed = {n for n in theirs.config if n[0] != "_" and rebuilt.config[n] != theirs.config[n]}
    assert changed <= {"down_block_types", "up_block_types", "block_out_channels", "attention_head_dim"}
    for name in changed:  # lists that were tuples, and one number for all levels
        assert list(rebuilt.config[name]) == list(theirs.config[name])


def test_heads_are_what_the_config_says_and_else_those_of_the_version():
    v1, v2 = original("v1").state_dict(), original("v2").state_dict()
    assert to_ours(v1, {})[1]["heads"] == (8, 8)
    assert to_ours(v2, {"attention_head_dim": [2, 4]})[1]["heads"] == (2, 4)
    assert to_ours(v2, {"attention_head_dim": 8, "num_attention_heads": 4})[1]["heads"] == (4, 4)
    assert to_ours(v1, {"heads": (1, 2)})[1]["heads"] == (1, 2)
    wide = {n: torch.empty(*(s * 5 if s in (32, 64) else s for s in t.shape), device="meta") for n, t in v2.items()}
    assert to_ours(wide, {})[1]["heads"] == (160 // 64, 320 // 64)


def test_what_no_shape_tells_comes_from_the_config():
    found = to_ours(original("v2").state_dict(), {"sample_size": 96, "upcast_attention": True, "norm_num_groups": 16})
    assert [found[1][name] for name in ("size", "upcast", "groups")] == [96, True, 16]


@pytest.mark.parametrize("other", [{"act_fn": "gelu"}, {"flip_sin_to_cos": False}, {"norm_eps": 1e-6}])
def test_a_unet_that_computes_otherwise_is_refused_by_name(other):
    with pytest.raises(WeightsMismatch, match=f"{next(iter(other))}={next(iter(other.values()))!r}"):
        to_ours(original("v1").state_dict(), other)


# --- CompVis ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("v1", (2, 2, {0})), ("v2", (2, 2, {0})), ("inpainting", (2, 2, {0})), ("bk-sdm-base", (2, 1, {0}))]
    + [("three levels", (3, 2, {0, 2})), ("deep", (2, 2, {0}))],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "state_dict.model.diffusion_model."])
def test_compvis_files_load_and_come_back(kind, sizes, prefix):
    theirs = original(kind).state_dict()
    file = compvis(theirs, *sizes)
    assert file.keys().isdisjoint(theirs) and len(file) == len(theirs)
    ours, config = to_ours({prefix + name: tensor for name, tensor in file.items()}, {"heads": (8, 8, 8)[: sizes[0]]})
    assert same(to_diffusers(ours, config)[0], theirs)
    assert same(to_compvis(ours, config), file)


def test_a_full_size_unet_has_compvis_names_and_tensors():
    for config, inputs in ((UNetConfig(), 4), (UNetConfig(channels=9), 9)):
        with torch.device("meta"):
            state = UNet(config).state_dict()
        file = to_compvis(state, dataclasses.asdict(config))
        assert len(file) == 686
        assert file["input_blocks.0.0.weight"].shape == (320, inputs, 3, 3)
        assert file["input_blocks.9.0.op.weight"].shape == (1280, 1280, 3, 3)
        assert file["output_blocks.2.1.conv.weight"].shape == (1280, 1280, 3, 3)
        assert file["output_blocks.8.2.conv.weight"].shape == (640, 640, 3, 3)
        assert file["middle_block.1.proj_in.weight"].shape == (1280, 1280, 1, 1)
        assert file["output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight"].shape == (320, 768)
        ours, found = to_ours(file, {})
        assert UNetConfig.from_dict(found) == config
        assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in state.items()}


def test_averages_are_found_by_their_names_without_dots():
    raw = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1), "betas": torch.ones(3)}
    kept = {"model_ema.diffusion_modelinput_blocks00weight": torch.ones(1), "model_ema.decay": torch.zeros(())}
    root = "model.diffusion_model."
    assert averaged(raw, root)["input_blocks.0.0.weight"].item() == 0
    assert averaged(raw | kept, root)["input_blocks.0.0.weight"].item() == 1
    with pytest.raises(WeightsMismatch, match="not of 1 tensors: out.2.bias"):
        averaged({**raw, **kept, "model.diffusion_model.out.2.bias": torch.zeros(1)}, root)


# --- ours, and others ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["v1", "v2", "bk-sdm-tiny"])
def test_our_own_layout_is_left_as_it_is(kind):
    theirs = original(kind)
    model = loaded(theirs.state_dict(), dict(theirs.config))
    state, sizes = to_ours(model.state_dict(), dataclasses.asdict(model.config))
    assert same(state, model.state_dict()) and UNetConfig.from_dict(sizes) == model.config


def test_tensors_too_many_or_too_few_are_reported_by_strict_loading():
    state = original("v1").state_dict()
    with pytest.raises(WeightsMismatch, match="left over: add_embedding.linear_1.weight"):
        loaded(state | {"add_embedding.linear_1.weight": torch.zeros(1)}, {})
    del state["mid_block.resnets.1.norm2.bias"]
    with pytest.raises(WeightsMismatch, match="missing: mid_block.resnets.1.norm2.bias"):
        loaded(state, {})


def test_weights_of_another_kind_and_what_compvis_lacks_are_refused():
    with pytest.raises(WeightsMismatch, match=r"these 1 tensors \(visual.proj, ...\) are not the UNet"):
        to_ours({"visual.proj": torch.zeros(1)}, {})
    with pytest.raises(WeightsMismatch, match="has a middle block and this one has none"):
        to_compvis(*to_ours(original("bk-sdm-tiny").state_dict(), {}))
