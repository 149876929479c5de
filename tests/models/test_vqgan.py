"""VQGAN: what lies between pictures of 0..1 and the halves, which tests/blocks/test_autoencoder.py holds."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from zoo.errors import SettingsError
from zoo.models.vqgan import Vqgan, VqganConfig, inverse_haar

TINY = VqganConfig(size=32, widths=(32, 32, 64), blocks=1, attention=(2,), latent=12, vocab=20, code_width=8)


def make(**changes) -> Vqgan:
    torch.manual_seed(0)
    model = Vqgan(replace(TINY, **changes)).eval()
    torch.nn.init.normal_(next(model.quantize.parameters()))
    # A fresh decoder is nearly grey: spread its pixels over the whole range and beyond.
    torch.nn.init.normal_(model.decoder.conv_out.weight, std=0.2)
    return model


def test_the_published_sizes_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        model = Vqgan(VqganConfig())
    count = lambda *parts: sum(p.numel() for part in parts for p in part.parameters())  # noqa: E731
    assert count(model.encoder, model.quant_conv) == 29_363_968
    assert count(model.decoder, model.post_quant_conv) == 42_515_587
    assert count(model) == 76_073_859
    assert (model.image_size, model.grid, model.vocab) == (256, 16, 16384)


def test_the_eps_of_the_config_is_that_of_every_norm():
    for eps in (1e-6, 1e-5):
        norms = [part for part in make(eps=eps).modules() if isinstance(part, torch.nn.GroupNorm)]
        assert len(norms) > 20 and {norm.eps for norm in norms} == {eps}


def test_attributes_say_the_sides_and_the_number_of_codes():
    model = make()
    assert (model.image_size, model.grid, model.vocab) == (32, 8, 20)
    codes = model.encode(torch.rand(2, 3, 32, 32))
    assert codes.shape == (2, 8, 8) and codes.dtype == torch.int64
    assert len(codes.unique()) > 1
    assert model.decode(codes).shape == (2, 3, 32, 32)


@torch.no_grad()
@pytest.mark.parametrize("black", [-1.0, 0.0])
def test_pictures_are_0_to_1_outside_and_black_to_1_inside(black):
    model, image = make(black=black), torch.rand(2, 3, 32, 32)
    inside = 2 * image - 1 if black else image
    torch.testing.assert_close(model.latents(image), model.quant_conv(model.encoder(inside)))
    codes = model.encode(image)
    differences = model.latents(image).movedim(1, -1)[..., None, :] - model.quantize.embedding.weight
    assert torch.equal(codes, differences.square().sum(-1).argmin(-1))
    rows = model.quantize.embedding.weight[codes].permute(0, 3, 1, 2)
    pixels = model.decoder(model.post_quant_conv(rows))
    assert pixels.min() < black and pixels.max() > 1  # so that the clamp shows
    expected = (0.5 * pixels + 0.5 if black else pixels).clamp(0, 1)
    torch.testing.assert_close(model.decode(codes), expected)
    torch.testing.assert_close(model.reconstruct(image), expected)


@torch.no_grad()
def test_gumbels_codes_are_the_likeliest():
    model, image = make(quantizer="gumbel"), torch.rand(1, 3, 32, 32)
    assert torch.equal(model.encode(image), model.quantize.proj(model.latents(image)).argmax(1))
    assert model.reconstruct(image).shape == image.shape


def slow_haar(bands: Tensor) -> Tensor:
    """The synthesis with the filters (1, 1) and (1, -1), each by the root of a half: rows first, then columns."""
    root, height, width = 0.5**0.5, *bands.shape[-2:]
    image = torch.zeros(len(bands), 3, 2 * height, 2 * width)
    for color in range(3):
        low = bands[:, color]
        rows, columns, both = (bands[:, 3 + 3 * color + i] for i in range(3))
        for i in (0, 1):
            sign = 1 - 2 * i
            left, right = root * (low + sign * rows), root * (columns + sign * both)
            image[:, color, i::2, 0::2] = root * (left + right)
            image[:, color, i::2, 1::2] = root * (left - right)
    return image


def test_the_wavelets_bands_become_pictures_of_twice_the_side():
    bands = torch.randn(2, 12, 3, 5)
    torch.testing.assert_close(inverse_haar(bands), slow_haar(bands))
    averages = torch.cat([torch.full((1, 3, 2, 2), 2.0), torch.zeros(1, 9, 2, 2)], 1)
    assert torch.equal(inverse_haar(averages), torch.ones(1, 3, 4, 4))


@torch.no_grad()
def test_a_decoder_of_bands_gives_back_larger_pictures():
    model = make(haar=True)
    codes = model.encode(torch.rand(1, 3, 32, 32))
    rows = model.quantize.decode(codes)
    expected = slow_haar(model.decoder(model.post_quant_conv(rows)))
    assert expected.shape == (1, 3, 64, 64)
    torch.testing.assert_close(model.decode(codes), (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=1e-5)


def test_without_an_encoder_it_decodes_and_says_why_it_cannot_encode():
    model = make(encoder=False)
    assert model.decode(torch.zeros(1, 8, 8, dtype=torch.int64)).shape == (1, 3, 32, 32)
    assert not any(name.startswith(("encoder", "quant_conv")) for name in model.state_dict())
    for method in (model.encode, model.latents, model.reconstruct):
        with pytest.raises(SettingsError, match="without its encoder: it can only decode"):
            method(torch.rand(1, 3, 32, 32))


def test_half_precision_takes_and_gives_the_same_shapes():
    model = make().to(torch.bfloat16)
    picture = model.reconstruct(torch.rand(1, 3, 32, 32))
    assert picture.dtype == torch.bfloat16 and picture.shape == (1, 3, 32, 32)


def test_a_config_survives_json_and_unknown_quantizers_are_refused():
    assert VqganConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(TINY)))) == TINY
    with pytest.raises(SettingsError, match="quantizer='ema' is not one of vq, cosine, gumbel"):
        Vqgan(replace(TINY, quantizer="ema"))
    with pytest.raises(TypeError, match="layers"):
        VqganConfig.from_dict({"layers": 3})
