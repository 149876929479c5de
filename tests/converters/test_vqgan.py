"""Random weights in each published layout load strictly and give what the same weights give under our names.

Layouts are built here name by name from their sources: taming's lists are numbered, vqgan-jax's converter joins a list
and its number, ru-dalle's dwt wraps a whole decoder in another one.
"""

from __future__ import annotations

import dataclasses
import re

import msgpack
import pytest
import torch
from torch import Tensor

from zoo import weights
from zoo.converters.vqgan import to_ours
from zoo.errors import WeightsMismatch
from zoo.models.vqgan import Vqgan, VqganConfig

SIZES = VqganConfig(size=32, widths=(32, 32, 64), blocks=2, attention=(1, 2), latent=12, vocab=20, code_width=8)
VQ, GUMBEL = SIZES, dataclasses.replace(SIZES, code_width=12, quantizer="gumbel")
DWT = dataclasses.replace(GUMBEL, haar=True)
LOSS = {"loss.discriminator.main.0.weight": torch.zeros(1), "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1)}


def make(config: VqganConfig) -> Vqgan:
    torch.manual_seed(0)
    model = Vqgan(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else 1.5 * parameter[0].numel() ** -0.5)
    return model


def loaded(state: dict[str, Tensor], config: dict) -> Vqgan:
    ours, sizes = to_ours(state, config)
    with weights.blank():
        model = Vqgan(VqganConfig.from_dict(sizes))
    return weights.load(model, ours).eval()


@torch.no_grad()
def assert_same(found: Vqgan, expected: Vqgan) -> None:
    assert found.config == expected.config
    codes = torch.arange(20).remainder(expected.vocab).view(1, 4, 5)
    assert torch.equal(found.decode(codes), expected.decode(codes))
    if expected.encoder is not None:
        image = torch.rand(2, 3, 32, 32)
        assert torch.equal(found.latents(image), expected.latents(image))
        assert torch.equal(found.encode(image), expected.encode(image))


# --- the layouts ---
def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def dwt(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """ru-dalle's VQGanGumbelVAE(dwt=True): .model, a decoder in a decoder, and a post_quant_conv that nothing calls."""
    inner = {re.sub(r"^(decoder|post_quant_conv)\.", r"decoder.\1.", name): tensor for name, tensor in state.items()}
    inner |= {name: tensor + 9 for name, tensor in state.items() if name.startswith("post_quant_conv.")}
    inner |= {f"decoder.idwt.{name}": torch.zeros(1, 1, 2, 1) for name in ("g0_col", "g1_col", "g0_row", "g1_row")}
    return below("state_dict.model.", inner)


def detoker(state: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {name: tensor for name, tensor in state.items() if name.startswith(("post_quant_conv.", "decoder."))}
    return kept | {"embedding.weight": state["quantize.embedding.weight"]}


def flax(state: dict[str, Tensor], old: bool) -> dict[str, Tensor]:
    """vqgan_jax/convert_pt_model_to_jax.py; `old`: norms of flax before 0.3.6."""
    theirs = {}
    for name, tensor in state.items():
        *path, kind = re.sub(r"\b(\w+)\.(\d+)\b", r"\1_\2", name).split(".")
        if "norm" in path[-1]:
            kind, tensor = {"weight": "scale"}.get(kind, kind), tensor[None, None, None] if old else tensor
        elif kind == "weight" and tensor.ndim == 4:
            kind, tensor = "kernel", tensor.permute(2, 3, 1, 0)
        elif kind == "weight":
            kind = "embedding"
        theirs["/".join([*path, kind])] = tensor.contiguous()
    return theirs


# --- properties ---
@pytest.mark.parametrize("config", [VQ, GUMBEL], ids=["vq", "gumbel"])
def test_tamings_checkpoints_load_and_their_losses_are_left_out(config, tmp_path):
    """Those of taming, minDALL-E's stage 1 and ruDALL-E's Gumbel VQGAN."""
    model = make(config)
    training = {"optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}], "epoch": 7}
    torch.save({"state_dict": {**model.state_dict(), **LOSS}, **training}, tmp_path / "last.ckpt")
    assert_same(loaded(weights.read(tmp_path / "last.ckpt"), {"size": 32}), model)


def test_rudalles_dwt_checkpoint_loads_with_the_decoders_own_post_quant_conv():
    model = make(DWT)
    assert_same(loaded(dwt(model.state_dict()), {"size": 32}), model)


def test_min_dalles_detoker_is_a_decoder_of_pixels_of_0_to_1():
    model = make(VQ)
    expected = Vqgan(dataclasses.replace(VQ, encoder=False, black=0.0)).eval()
    expected.load_state_dict({name: t for name, t in model.state_dict().items() if name in expected.state_dict()})
    assert_same(loaded(detoker(model.state_dict()), {"size": 32}), expected)


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("nested", ["", "params/"])
def test_dalle_minis_flax_state_is_turned_round(old, nested):
    model = make(dataclasses.replace(VQ, black=0.0))
    state = flax(model.state_dict(), old)
    for name in (
        "encoder/down_0/block_1/conv1/kernel",
        "decoder/mid/block_1/norm1/scale",
        "decoder/up_2/attn_0/q/bias",
    ):
        assert name in state
    assert_same(loaded(below(nested, state), {"resolution": 32, "ch_mult": [1, 1, 2], "n_embed": 20}), model)


def test_dalle_minis_file_is_read_from_msgpack(tmp_path):
    model = make(dataclasses.replace(VQ, black=0.0))
    tree: dict = {}
    for name, tensor in flax(model.state_dict(), old=True).items():
        *path, leaf = name.split("/")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        array = (tuple(tensor.shape), "float32", tensor.numpy().tobytes())
        branch[leaf] = msgpack.ExtType(1, msgpack.packb(array))
    (tmp_path / "flax_model.msgpack").write_bytes(msgpack.packb(tree))
    assert_same(loaded(weights.read(tmp_path), {"resolution": 32}), model)


@pytest.mark.parametrize(
    "config",
    [VQ, GUMBEL, DWT, dataclasses.replace(VQ, encoder=False, black=0.0, attention=(), blocks=1)],
    ids=["vq", "gumbel", "dwt", "decoder"],
)
def test_our_own_layout_is_left_as_it_is(config):
    model = make(config)
    state, sizes = to_ours(model.state_dict(), dataclasses.asdict(config))
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], t) for name, t in model.state_dict().items())
    assert VqganConfig.from_dict(sizes) == config


def test_a_config_that_says_black_is_believed():
    assert to_ours(detoker(make(VQ).state_dict()), {"black": -1.0})[1]["black"] == -1
    assert to_ours(make(VQ).state_dict(), {"black": 0.0})[1]["black"] == 0


def test_tensors_too_many_or_too_few_are_reported_by_strict_loading():
    state = make(VQ).state_dict()
    with pytest.raises(WeightsMismatch, match="left over: quantize.used"):
        loaded(state | {"quantize.used": torch.zeros(1)}, {})
    del state["encoder.mid.attn_1.q.bias"]
    with pytest.raises(WeightsMismatch, match="missing: encoder.mid.attn_1.q.bias"):
        loaded(state, {})


def test_weights_of_another_kind_are_refused_by_name():
    with pytest.raises(WeightsMismatch, match=r"these 1 tensors \(visual.proj, ...\) are not a VQGAN"):
        to_ours({"visual.proj": torch.zeros(1)}, {})
    state = make(VQ).state_dict()
    book = state.pop("quantize.embedding.weight")
    with pytest.raises(WeightsMismatch, match="are not a VQGAN"):
        to_ours(state, {})
    state["quantize.embedding.weight"] = book
    with pytest.raises(WeightsMismatch, match="lacks a level"):
        to_ours({name: tensor for name, tensor in state.items() if not name.startswith("decoder.up.1.")}, {})
