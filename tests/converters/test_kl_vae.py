"""Autoencoders of diffusers with random weights load strictly and give what they gave, under old names and new ones;
CompVis's names are those of ldm/modules/diffusionmodules/model.py, which ours are too."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from zoo import AutoLoader, weights
from zoo.converters.kl_vae import to_diffusers, to_ours
from zoo.errors import WeightsMismatch
from zoo.models.kl_vae import KlVae, KlVaeConfig

TINY = {"block_out_channels": (32, 64), "layers_per_block": 1, "latent_channels": 4, "sample_size": 32}
KINDS = {
    "plain": TINY,
    "three levels": TINY | {"block_out_channels": (32, 32, 64), "layers_per_block": 2, "norm_num_groups": 16},
    "without quant": TINY | {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
    "attention": TINY | {"attention": (1,)},
}
LOSS = {"loss.discriminator.main.0.weight": torch.zeros(1), "loss.logvar": torch.zeros(())}
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def original(kind: str) -> AutoencoderKL:
    torch.manual_seed(0)
    sizes = dict(KINDS[kind])
    has = ["Attn" * (n in sizes.get("attention", ())) for n in range(len(sizes["block_out_channels"]))]
    sizes.pop("attention", None)
    down, up = [f"{a}DownEncoderBlock2D" for a in has], [f"{a}UpDecoderBlock2D" for a in reversed(has)]
    model = AutoencoderKL(down_block_types=down, up_block_types=up, scaling_factor=0.3, **sizes)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return model.eval()


def loaded(state: dict[str, Tensor], config: dict) -> KlVae:
    ours, sizes = to_ours(state, config)
    with weights.blank():
        model = KlVae(KlVaeConfig.from_dict(sizes))
    return weights.load(model, ours).eval()


def old_names(state: dict[str, Tensor], convolutions: bool) -> dict[str, Tensor]:
    made = {}
    for name, tensor in state.items():
        if ".attentions." in name:
            name = re.sub(r"to_q|to_k|to_v|to_out\.0", lambda m: OLD[m[0]], name)
            tensor = tensor[:, :, None, None] if convolutions and tensor.ndim == 2 else tensor
        made[name] = tensor
    return made


@torch.no_grad()
def assert_same(ours: KlVae, theirs: AutoencoderKL) -> None:
    image, latents = torch.rand(2, 3, 32, 16), torch.randn(2, theirs.config.latent_channels, 8, 4)
    moments = theirs.encode(image * 2 - 1).latent_dist.parameters
    assert moments.std() > 0.1
    torch.testing.assert_close(ours.moments(image), moments, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours.draw(latents), theirs.decode(latents).sample, atol=1e-5, rtol=1e-4)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], tensor) for name, tensor in b.items())


# --- diffusers -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_an_autoencoder_of_diffusers_gives_what_it_gave_and_comes_back(kind, tmp_path):
    theirs = original(kind)
    theirs.save_pretrained(tmp_path)
    ours = AutoLoader("img_tokenizing", "kl-vae", weights=tmp_path, device="cpu").get_model()
    assert_same(ours, theirs)
    assert (ours.config.scale, ours.config.size) == (0.3, 32)
    back, config = to_diffusers(ours.state_dict(), dataclasses.asdict(ours.config))
    assert same(back, theirs.state_dict())
    rebuilt = AutoencoderKL.from_config(config)
    rebuilt.load_state_dict(back)
    assert_same(ours, rebuilt.eval())
    assert (rebuilt.config.scaling_factor, rebuilt.config.sample_size) == (0.3, 32)


@pytest.mark.parametrize("convolutions", [True, False])
def test_old_names_of_the_attention_load_alike(convolutions, tmp_path):
    theirs = original("plain")
    state = old_names(theirs.state_dict(), convolutions)
    assert "encoder.mid_block.attentions.0.query.weight" in state
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    ours = loaded(weights.read(tmp_path), dict(theirs.config))
    assert_same(ours, theirs)
    assert same(to_diffusers(ours.state_dict(), dataclasses.asdict(ours.config))[0], theirs.state_dict())


def test_the_transform_is_of_the_size_that_the_config_says(tmp_path):
    original("plain").save_pretrained(tmp_path)
    assert AutoLoader("img_tokenizing", "kl-vae", weights=tmp_path).get_transform().img_size == 32


# --- CompVis ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", ["", "state_dict.", "first_stage_model.", "state_dict.first_stage_model.", "vae."])
@pytest.mark.parametrize("kind", KINDS)
def test_compvis_files_load_with_their_losses_left_out(kind, prefix):
    theirs = original(kind)
    model = loaded(theirs.state_dict(), dict(theirs.config))
    file = {prefix + name: tensor for name, tensor in (model.state_dict() | LOSS).items()}
    found = loaded(file, {"norm_num_groups": theirs.config.norm_num_groups})
    assert same(found.state_dict(), model.state_dict())
    assert found.config == dataclasses.replace(model.config, size=512, scale=0.18215)


def test_a_full_size_autoencoder_has_the_published_names():
    with torch.device("meta"):
        state = KlVae(KlVaeConfig()).state_dict()
    assert len(state) == 248
    published = {"encoder.down.2.downsample.conv.weight", "encoder.mid.attn_1.proj_out.bias", "quant_conv.weight"}
    assert published | {"decoder.up.1.block.0.nin_shortcut.weight", "decoder.up.3.upsample.conv.bias"} <= state.keys()
    theirs, _ = to_diffusers(state, dataclasses.asdict(KlVaeConfig()))
    with torch.device("meta"):
        levels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        widths = (128, 256, 512, 512)
        expected = AutoencoderKL(block_out_channels=widths, layers_per_block=2, **levels).state_dict()
    assert {n: t.shape for n, t in theirs.items()} == {n: t.shape for n, t in expected.items()}
    ours, config = to_ours(theirs, {})
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in state.items()}
    assert KlVaeConfig.from_dict(config) == KlVaeConfig()


# --- ours, and others ------------------------------------------------------------------------------------------------
def test_our_own_layout_is_left_as_it_is():
    torch.manual_seed(0)
    config = KlVaeConfig(size=64, widths=(32, 64), blocks=1, groups=4, scale=0.5, kl_weight=0.01)
    model = KlVae(config)
    state, sizes = to_ours(model.state_dict(), dataclasses.asdict(config))
    assert same(state, model.state_dict()) and KlVaeConfig.from_dict(sizes) == config


def test_tensors_too_many_or_too_few_are_reported_by_strict_loading():
    state = original("plain").state_dict()
    with pytest.raises(WeightsMismatch, match="left over: model_ema.quant_convbias"):
        loaded(state | {"model_ema.quant_convbias": torch.zeros(1)}, {})
    del state["decoder.up_blocks.0.resnets.1.norm2.bias"]
    with pytest.raises(WeightsMismatch, match="missing: decoder.up.1.block.1.norm2.bias"):
        loaded(state, {})


def test_weights_of_another_kind_are_refused():
    with pytest.raises(WeightsMismatch, match=r"these 1 tensors \(visual.proj, ...\) are not the autoencoder"):
        to_ours({"visual.proj": torch.zeros(1)}, {})
    state = loaded(original("plain").state_dict(), {}).state_dict()
    with pytest.raises(WeightsMismatch, match="a VQ one is loaded as 'vqgan'"):
        to_ours(state | {"quantize.embedding.weight": torch.zeros(1)}, {})
    with pytest.raises(WeightsMismatch, match="shift_factor=0.1"):
        to_ours(state, {"shift_factor": 0.1})
