"""Random weights in each published layout load strictly and give what the same weights give under our names.

Layouts are built here name by name from their sources: taming's lists are numbered, vqgan-jax's converter joins a list
and its number, ru-dalle's dwt wraps a whole decoder in another one. CLIP-GEN's network is built here of torch's own
layers, and ours draws and encodes as it does.
"""

from __future__ import annotations

import dataclasses
import re

import msgpack
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import weights
from zoo.converters.vqgan import to_ours, to_taming
from zoo.errors import SettingsError, WeightsMismatch
from zoo.models.vqgan import Vqgan, VqganConfig

SIZES = VqganConfig(size=32, widths=(32, 32, 64), blocks=2, attention=(1, 2), latent=12, vocab=20, code_width=8)
VQ = dataclasses.replace(SIZES, codebook=0.25, commitment=1.0)  # as taming's runs, for a loss of beta=0.25
GUMBEL = dataclasses.replace(VQ, code_width=12, quantizer="gumbel")
COSINE = dataclasses.replace(SIZES, quantizer="cosine", decay=0.9, restart=0.5)  # zoo's own
RELEASE = dataclasses.replace(VQ, code_width=12, vocab=50, eps=1e-5, codebook=0.2)
FIRST_STAGES = {  # latent-diffusion's, whose attention is [] and [32] of 256 pixels
    "vq-f4": dataclasses.replace(VQ, attention=(), latent=3, code_width=3),
    "vq-f8": dataclasses.replace(VQ, attention=(2,), latent=4, code_width=4),
}
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


# --- CLIP-GEN's network, of models/codec.py and models/quantizer.py; the sizes are those of RELEASE ---
class Residual(nn.Module):
    def __init__(self, a: int, b: int):
        super().__init__()
        first, second = (nn.Conv2d(channels, b, 3, padding=1) for channels in (a, b))
        norms = nn.GroupNorm(32, a), nn.GroupNorm(32, b)
        self.block = nn.Sequential(norms[0], nn.SiLU(), first, norms[1], nn.SiLU(), nn.Dropout(0.0), second)
        if a != b:
            self.shortcut = nn.Conv2d(a, b, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) + (self.shortcut(x) if hasattr(self, "shortcut") else x)


class Attention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.attn = nn.MultiheadAttention(channels, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        places = self.norm(x).flatten(2).mT
        return x + self.attn(places, places, places)[0].mT.reshape(x.shape)


class Resized(nn.Module):
    def __init__(self, channels: int, up: bool):
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if up else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2) if self.up else F.pad(x, (0, 1, 0, 1)))


def chain(text: str) -> nn.Sequential:
    """r32-64: a residual block, a64: attention, d64 and u64: down and up."""
    kinds = {"r": Residual, "a": Attention, "d": lambda c: Resized(c, up=False), "u": lambda c: Resized(c, up=True)}
    return nn.Sequential(*(kinds[link[0]](*map(int, link[1:].split("-"))) for link in text.split()))


class ClipGenVqgan(nn.Module):
    def __init__(self, discriminator: bool = True):
        super().__init__()
        self.encoder, self.decoder, self.quantizer = nn.Module(), nn.Module(), nn.Module()
        self.encoder.conv_in = nn.Conv2d(3, 32, 3, padding=1)
        self.encoder.down = chain("r32-32 r32-32 d32 r32-32 a32 r32-32 a32 d32 r32-64 a64 r64-64 a64")
        self.encoder.mid = chain("r64-64 a64 r64-64")
        ends = nn.Conv2d(64, 12, 3, padding=1), nn.Conv2d(12, 12, 1)
        self.encoder.final = nn.Sequential(nn.GroupNorm(32, 64), nn.SiLU(), *ends)
        self.decoder.quant_conv_in, self.decoder.conv_in = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 64, 3, padding=1)
        self.decoder.mid = chain("r64-64 a64 r64-64")
        first = "r64-64 a64 r64-64 a64 r64-64 a64 u64 r64-32 a32 r32-32 a32 r32-32 a32 u32"
        self.decoder.up = chain(f"{first} r32-32 r32-32 r32-32")
        self.decoder.final = nn.Sequential(nn.GroupNorm(32, 32), nn.SiLU(), nn.Conv2d(32, 3, 3, padding=1))
        self.quantizer.embedding = nn.Embedding(50, 12)
        if discriminator:
            self.discriminator = nn.Module()
            later = (nn.Conv2d(4, 4, 4, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU(0.2))
            self.discriminator.features = nn.Sequential(nn.Conv2d(3, 4, 4), nn.LeakyReLU(0.2), *3 * later)
            self.discriminator.head = nn.Conv2d(4, 1, 4)

    def latents(self, image: Tensor) -> Tensor:
        latents = self.encoder.conv_in(image * 2 - 1)
        for part in (self.encoder.down, self.encoder.mid, self.encoder.final):
            latents = part(latents)
        return latents

    def encode(self, image: Tensor) -> Tensor:
        return torch.cdist(self.latents(image).movedim(1, -1), self.quantizer.embedding.weight).argmin(-1)

    def decode(self, codes: Tensor) -> Tensor:
        x = self.decoder.conv_in(self.decoder.quant_conv_in(self.quantizer.embedding(codes).movedim(-1, 1)))
        for part in (self.decoder.mid, self.decoder.up, self.decoder.final):
            x = part(x)
        return (x.clamp(-1, 1) + 1) / 2


def clip_gen(discriminator: bool = True) -> ClipGenVqgan:
    torch.manual_seed(0)
    model = ClipGenVqgan(discriminator).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim == 1 else 1.2 * parameter[0].numel() ** -0.5)
    return model


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
    [
        VQ,
        GUMBEL,
        DWT,
        COSINE,
        dataclasses.replace(VQ, encoder=False, black=0.0, attention=(), blocks=1),
        dataclasses.replace(SIZES, eps=1e-5, decay=0.99),
    ],
    ids=["vq", "gumbel", "dwt", "cosine", "decoder", "eps"],
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


# --- latent-diffusion's first stages ---
@pytest.mark.parametrize("config", FIRST_STAGES.values(), ids=FIRST_STAGES)
def test_first_stages_load_alone_and_out_of_a_whole_diffusion_model(config):
    model = make(config)
    alone = below("state_dict.", {**model.state_dict(), **LOSS})
    others = ("model.diffusion_model.out.2.weight", "cond_stage_model.embedding.weight", "model_ema.decay", "betas")
    whole = below("first_stage_model.", model.state_dict()) | {name: torch.zeros(1) for name in others}
    for state in (alone, whole, below("state_dict.", whole)):
        assert_same(loaded(state, {"size": 32}), model)


# --- CLIP-GEN's release ---
@torch.no_grad()
@pytest.mark.parametrize("discriminator", [True, False])
@pytest.mark.parametrize("bare", [True, False])
def test_clip_gens_release_encodes_and_draws_as_its_network_does(discriminator, bare, tmp_path):
    theirs = clip_gen(discriminator)
    training = {"epoch": 3, "opt_g": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}}
    torch.save(theirs.state_dict() if bare else {"model": theirs.state_dict(), **training}, tmp_path / "vqgan_coco.pt")
    ours = loaded(weights.read(tmp_path / "vqgan_coco.pt"), {"size": 32})
    assert ours.config == RELEASE
    ours, theirs = ours.double(), theirs.double()  # so that the eps shows
    image = torch.rand(8, 3, 32, 32, dtype=torch.double)
    codes = theirs.encode(image)
    assert len(codes.unique()) > 5
    torch.testing.assert_close(ours.latents(image), theirs.latents(image), atol=1e-9, rtol=0)
    assert torch.equal(ours.encode(image), codes)
    drawn = theirs.decode(codes)
    assert 0.1 < drawn.std() and drawn.frac().count_nonzero() > drawn.numel() / 10  # not all black or white
    torch.testing.assert_close(ours.decode(codes), drawn, atol=1e-9, rtol=0)


def test_every_tensor_of_clip_gens_release_is_asked_for_and_no_other_one_taken():
    state = clip_gen().state_dict()
    forms = {re.sub(r"\.\d+\.", ".N.", name, count=1): name for name in state}
    for name in forms.values():
        if not name.startswith("discriminator."):
            with pytest.raises(WeightsMismatch):
                loaded({other: tensor for other, tensor in state.items() if other != name}, {})
    for name in ("encoder.down.0.block.1.weight", "decoder.up.1.attn.bias_k", "quantizer.used", "epoch"):
        with pytest.raises(WeightsMismatch, match=f"1 are left over: {name}"):
            loaded(state | {name: torch.zeros(1)}, {})


def test_clip_gens_eps_is_that_of_its_layout_and_the_rest_what_its_files_say():
    """A card of taming's weights would hide what they are."""
    found = to_ours(clip_gen().state_dict(), {"eps": 1e-6, "codebook": 1.0, "commitment": 0.25})[1]
    assert (found["eps"], found["codebook"], found["commitment"]) == (1e-5, 1.0, 0.25)


# --- ours -> taming's ---
@pytest.mark.parametrize("config", [VQ, GUMBEL, *FIRST_STAGES.values()], ids=["vq", "gumbel", *FIRST_STAGES])
def test_tamings_tensors_come_back_bit_for_bit(config):
    theirs = make(config).state_dict()
    ours, found = to_ours(below("state_dict.", {**theirs, **LOSS}), {"size": 32})
    for state in (to_taming(ours, found), to_taming(below("state_dict.", {**theirs, **LOSS}), found)):
        assert state.keys() == theirs.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in theirs.items())


@torch.no_grad()
def test_a_vqgan_of_zoos_own_training_is_a_plain_one_to_taming():
    model = make(COSINE)
    assert {"quantize.counts", "quantize.sums"} < model.state_dict().keys()
    plain = Vqgan(VQ).eval()  # of taming's names and of its nearest row
    plain.load_state_dict(to_taming(model.state_dict(), dataclasses.asdict(COSINE)))
    image = torch.rand(4, 3, 32, 32)
    assert torch.equal(plain.encode(image), model.encode(image))
    torch.testing.assert_close(plain.reconstruct(image), model.reconstruct(image))


def test_clip_gens_tensors_get_tamings_names_but_not_in_silence():
    ours, config = to_ours(clip_gen().state_dict(), {"size": 32})
    assert ours.keys() == make(RELEASE).state_dict().keys()
    for state in (clip_gen().state_dict(), ours):
        with pytest.raises(SettingsError, match="cannot be told eps=1e-05: its network has eps=1e-06"):
            to_taming(state, config)
    stated = to_taming(ours, config | {"eps": 1e-6})
    assert stated.keys() == ours.keys() and all(torch.equal(stated[name], ours[name]) for name in ours)


@pytest.mark.parametrize("change", [{"black": 0.0}, {"haar": True}, {"encoder": False}])
def test_what_tamings_network_cannot_be_told_is_refused_by_name(change):
    config = dataclasses.replace(VQ, **change)
    with pytest.raises(SettingsError, match="cannot be told {}={}:".format(*list(change.items())[0])):
        to_taming(make(config).state_dict(), dataclasses.asdict(config))
