"""OpenAI's pickled modules and FLAVA's state give the codes and pictures that their own formulas give.

The modules here stand in for those of PyPI's DALL-E 0.1: the same tree of the same names, pickled under the same module
path, and a forward pass written anew from the paper's figure, without a convolution of torch's.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import weights
from zoo.converters.dvae import to_ours
from zoo.errors import SettingsError, WeightsMismatch
from zoo.models.dvae import Dvae, DvaeConfig

HIDDEN, VOCAB, STEM = 8, 24, 6


# --- the published modules, as data -----------------------------------------------------------------------------------
class Conv2d(nn.Module):
    __module__ = "dall_e.utils"

    def __init__(self, n_in: int, n_out: int, kw: int):
        super().__init__()
        self.n_in, self.n_out, self.kw, self.device = n_in, n_out, kw, torch.device("cpu")
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) / (n_in * kw**2) ** 0.5, requires_grad=False)
        self.b = nn.Parameter(torch.randn(n_out) / 2, requires_grad=False)


class EncoderBlock(nn.Module):
    __module__ = "dall_e.encoder"

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, ...]):
        super().__init__()
        self.post_gain = 1 / 64
        self.id_path = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        widths = [n_in, *[n_out // 4] * 3, n_out]
        self.res_path = nn.Sequential()
        for i, kw in enumerate(kernels):
            self.res_path.add_module(f"relu_{i + 1}", nn.ReLU())
            self.res_path.add_module(f"conv_{i + 1}", Conv2d(widths[i], widths[i + 1], kw))


class DecoderBlock(EncoderBlock):
    __module__ = "dall_e.decoder"


class Encoder(nn.Module):
    __module__ = "dall_e.encoder"

    def __init__(self):
        super().__init__()
        self.blocks = tower(
            EncoderBlock, Conv2d(3, HIDDEN, 7), [8, 16, 32, 64], (3, 3, 3, 1), ("pool", nn.MaxPool2d(2)), VOCAB
        )


class Decoder(nn.Module):
    __module__ = "dall_e.decoder"

    def __init__(self):
        super().__init__()
        upsample = ("upsample", nn.Upsample(scale_factor=2, mode="nearest"))
        self.blocks = tower(DecoderBlock, Conv2d(VOCAB, STEM, 1), [64, 32, 16, 8], (1, 3, 3, 3), upsample, 6)


def tower(block: type, first: nn.Module, widths: list[int], kernels: tuple, resize: tuple, out: int) -> nn.Module:
    blocks = nn.Sequential()
    blocks.add_module("input", first)
    channels = first.n_out
    for number, width in enumerate(widths, 1):
        group = nn.Sequential()
        group.add_module("block_1", block(channels, width, kernels))
        group.add_module("block_2", block(width, width, kernels))
        if number < 4:
            group.add_module(*resize)
        blocks.add_module(f"group_{number}", group)
        channels = width
    last = nn.Sequential()
    last.add_module("relu", nn.ReLU())
    last.add_module("conv", Conv2d(channels, out, 1))
    blocks.add_module("output", last)
    return blocks


@pytest.fixture
def published(tmp_path, monkeypatch):
    """Saves an encoder and a decoder as OpenAI did, whole; the classes can be imported while saving, never later."""

    def save(zipped: bool) -> tuple[Path, Encoder, Decoder]:
        torch.manual_seed(0)
        models = Encoder().eval(), Decoder().eval()
        with monkeypatch.context() as context:
            context.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
            for cls in (Conv2d, EncoderBlock, DecoderBlock, Encoder, Decoder):
                module = sys.modules.get(cls.__module__) or types.ModuleType(cls.__module__)
                setattr(module, cls.__name__, cls)
                context.setitem(sys.modules, cls.__module__, module)
            for model, name in zip(models, ("encoder.pkl", "decoder.pkl"), strict=True):
                torch.save(model, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert not any(name.startswith("dall_e") for name in sys.modules)
        return tmp_path, *models

    return save


# --- the formulas -----------------------------------------------------------------------------------------------------
def convolve(x: Tensor, layer: Conv2d) -> Tensor:
    """Each offset of the kernel is a shift of the picture, with zeros around it, and a product of matrices."""
    rows, columns, edge = *x.shape[-2:], layer.kw // 2
    padded = F.pad(x, (edge,) * 4)
    out = layer.b.view(1, -1, 1, 1).expand(len(x), -1, rows, columns)
    for i in range(layer.kw):
        for j in range(layer.kw):
            out = out + torch.einsum("bchw,oc->bohw", padded[..., i : i + rows, j : j + columns], layer.w[:, :, i, j])
    return out


def forward(blocks: nn.Module, x: Tensor, resize) -> Tensor:
    x = convolve(x, blocks.input)
    for number in (1, 2, 3, 4):
        for name in ("block_1", "block_2"):
            block = getattr(getattr(blocks, f"group_{number}"), name)
            path = x
            for conv in ("conv_1", "conv_2", "conv_3", "conv_4"):
                path = convolve(path.clamp_min(0), getattr(block.res_path, conv))
            x = (convolve(x, block.id_path) if isinstance(block.id_path, Conv2d) else x) + path / 64
        x = resize(x) if number < 4 else x
    return convolve(x.clamp_min(0), blocks.output.conv)


def logits_of(encoder: Encoder, image: Tensor) -> Tensor:
    def pool(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).amax((-1, -3))

    return forward(encoder.blocks, 0.1 + 0.8 * image, pool)


def picture_of(decoder: Decoder, codes: Tensor) -> Tensor:
    one_hot = (codes[:, None] == torch.arange(VOCAB)[None, :, None, None]).float()
    maps = forward(decoder.blocks, one_hot, lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2))
    return ((1 / (1 + torch.exp(-maps[:, :3])) - 0.1) / 0.8).clamp(0, 1)


def ours(*parts: tuple[str, Path], **config) -> Dvae:
    """The converted model of files and the prefixes of their names."""
    read = {prefix + name: tensor for prefix, path in parts for name, tensor in weights.read(path).items()}
    state, sizes = to_ours(read, config)
    with weights.blank():
        model = Dvae(DvaeConfig.from_dict(sizes))
    return weights.load(model, state).eval()


# --- properties -------------------------------------------------------------------------------------------------------
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")  # torch.save of before 1.6 keeps it, where it can
@pytest.mark.parametrize("zipped", [True, False])
def test_openais_pickles_give_the_codes_and_pictures_of_the_formulas(published, zipped):
    folder, encoder, decoder = published(zipped)
    model = ours(("encoder.", folder / "encoder.pkl"), ("decoder.", folder / "decoder.pkl"))
    assert model.config == DvaeConfig(size=256, vocab=VOCAB, hidden=HIDDEN, stem=STEM, groups=4, blocks=2)
    image = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        expected = logits_of(encoder, image)
        torch.testing.assert_close(model.logits(image), expected, rtol=1e-5, atol=1e-5)
        codes = model.encode(image)
        assert torch.equal(codes, expected.argmax(1))
        assert len(codes.unique()) > 1
        pictures = picture_of(decoder, codes)
        torch.testing.assert_close(model.decode(codes), pictures, rtol=1e-5, atol=1e-5)
        assert pictures.std() > 0.05


def test_one_file_is_known_for_the_encoder_or_the_decoder_by_its_shapes(published):
    folder, encoder, _ = published(True)
    alone = ours(("", folder / "encoder.pkl"))
    image = torch.rand(1, 3, 8, 8)
    assert torch.equal(alone.encode(image), logits_of(encoder, image).argmax(1))
    with pytest.raises(SettingsError, match="can only encode"):
        alone.decode(alone.encode(image))
    with pytest.raises(WeightsMismatch, match="decoder of a dVAE alone: put the encoder's file"):
        ours(("", folder / "decoder.pkl"))


@pytest.mark.parametrize("wrapper", ["", "image_codebook."])
def test_flavas_codebook_gives_the_codes_of_transformers(wrapper):
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

    torch.manual_seed(0)
    flava = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=HIDDEN, vocab_size=VOCAB)).eval()
    for parameter in flava.parameters():
        nn.init.normal_(parameter, std=0.1 if parameter.ndim == 1 else 2 * parameter[0].numel() ** -0.5)
    state, sizes = to_ours(
        {wrapper + name: tensor for name, tensor in flava.state_dict().items()},
        {"codebook_size": {"height": 112, "width": 112}, "size": {"height": 224, "width": 224}},
    )
    assert (sizes["size"], sizes["decoder"]) == (112, False)
    model = weights.load(Dvae(DvaeConfig.from_dict(sizes)), state).eval()
    image = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(image), flava.blocks(0.8 * image + 0.1), rtol=1e-5, atol=1e-5)
        assert torch.equal(model.encode(image), flava.get_codebook_indices(0.8 * image + 0.1))
    assert len(model.encode(image).unique()) > 1


@pytest.mark.parametrize(
    "config",
    [
        DvaeConfig(size=32, vocab=16, hidden=8, stem=4, groups=3, blocks=1),
        DvaeConfig(size=64, vocab=16, hidden=8, groups=2, blocks=3, decoder=False),
    ],
)
def test_our_own_layout_is_left_as_it_is(config):
    model = Dvae(config)
    state, sizes = to_ours(model.state_dict(), {"size": config.size})
    assert state.keys() == model.state_dict().keys()
    assert DvaeConfig.from_dict(sizes) == config


def test_weights_of_another_kind_are_refused_by_name():
    with pytest.raises(WeightsMismatch, match=r"these 1 tensors \(visual.proj, ...\) are not a dVAE"):
        to_ours({"visual.proj": torch.zeros(1)}, {})


def test_a_tensor_too_many_is_reported_by_strict_loading():
    model = Dvae(DvaeConfig(size=32, vocab=16, hidden=8, stem=4, groups=2, blocks=1))
    state, _ = to_ours(model.state_dict() | {"encoder.blocks.group_1.block_1.extra.w": torch.zeros(1)}, {})
    with pytest.raises(WeightsMismatch, match="left over: encoder.blocks.group_1.block_1.extra.weight"):
        weights.load(model, state)


def test_the_published_package_gives_the_same(tmp_path):
    """Where PyPI's DALL-E is installed, with attrs and blobfile."""
    encoders, decoders = (pytest.importorskip(f"dall_e.{name}") for name in ("encoder", "decoder"))
    torch.manual_seed(0)
    encoder = encoders.Encoder(n_hid=64, n_blk_per_group=1, vocab_size=512)
    decoder = decoders.Decoder(n_init=8, n_hid=64, n_blk_per_group=1, vocab_size=512)
    for part, model in (("encoder", encoder), ("decoder", decoder)):
        for name, bias in model.named_parameters():
            if name.endswith(".b"):
                nn.init.normal_(bias)
        torch.save(model, tmp_path / f"{part}.pkl")
    model = ours(("encoder.", tmp_path / "encoder.pkl"), ("decoder.", tmp_path / "decoder.pkl"))
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        logits = encoder(0.8 * image + 0.1)
        maps = decoder(F.one_hot(logits.argmax(1), 512).movedim(-1, 1).float())
        torch.testing.assert_close(model.logits(image), logits, rtol=1e-5, atol=1e-5)
        expected = ((torch.sigmoid(maps[:, :3]) - 0.1) / 0.8).clamp(0, 1)
        torch.testing.assert_close(model.reconstruct(image), expected, rtol=1e-5, atol=1e-5)
