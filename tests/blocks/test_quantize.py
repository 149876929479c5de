from __future__ import annotations

import pytest
import torch

from zoo.blocks import quantize
from zoo.blocks.quantize import GumbelQuantizer, VectorQuantizer


@pytest.fixture
def quantizer() -> VectorQuantizer:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(40, 6)
    torch.nn.init.normal_(quantizer.embedding.weight)
    # Rows of unequal length, so that the nearest is not the one with the largest product.
    quantizer.embedding.weight.data *= torch.linspace(0.2, 4, 40)[:, None]
    return quantizer


def nearest(latents: torch.Tensor, book: torch.Tensor) -> torch.Tensor:
    """Every latent against every row, squared differences summed in double precision."""
    differences = latents.double().movedim(1, -1)[..., None, :] - book.double()
    return differences.square().sum(-1).argmin(-1)


def test_a_code_is_the_nearest_row(quantizer):
    latents = 2 * torch.randn(2, 6, 5, 7)
    codes = quantizer.encode(latents)
    assert codes.dtype == torch.int64 and codes.shape == (2, 5, 7)
    assert torch.equal(codes, nearest(latents, quantizer.embedding.weight))
    assert len(codes.unique()) > 5


def test_a_row_is_its_own_nearest_and_comes_back(quantizer):
    codes = torch.arange(40).view(2, 4, 5)
    rows = quantizer.decode(codes)
    assert rows.shape == (2, 6, 4, 5)
    assert torch.equal(rows[1, :, 2, 3], quantizer.embedding.weight[codes[1, 2, 3]])
    assert torch.equal(quantizer.encode(rows), codes)


@pytest.mark.parametrize("room", [1, 40, 101, 10**6])
def test_how_much_is_compared_at_once_changes_no_code(quantizer, room, monkeypatch):
    latents = torch.randn(2, 6, 5, 7)
    whole = quantizer.encode(latents)
    monkeypatch.setattr(quantize, "ROOM", room)
    assert torch.equal(quantizer.encode(latents), whole)


def test_autocast_does_not_blur_rows_that_lie_close():
    """A fresh book's rows lie within 2 / V of one another; half precision cannot tell them apart."""
    torch.manual_seed(0)
    fresh = VectorQuantizer(512, 8)
    latents = 1 + fresh.decode(torch.randint(512, (2, 8, 8))).detach()
    expected = nearest(latents, fresh.embedding.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = fresh.encode(latents)
    assert (found == expected).float().mean() > 0.99


def test_gumbels_code_is_the_likeliest_by_its_projection():
    torch.manual_seed(0)
    quantizer = GumbelQuantizer(9, 4)
    latents = torch.randn(2, 4, 3, 5)
    codes = quantizer.encode(latents)
    weight, bias = quantizer.proj.weight[:, :, 0, 0], quantizer.proj.bias
    for place in ((0, 0, 0), (1, 2, 4), (0, 1, 3)):
        logits = weight @ latents[place[0], :, place[1], place[2]] + bias
        assert int(codes[place]) == int(logits.argmax())
    assert torch.equal(quantizer.decode(codes)[1, :, 2, 4], quantizer.embed.weight[codes[1, 2, 4]])
