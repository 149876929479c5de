"""The halves against a slow reference, written from taming's state dict one operation at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks.autoencoder import AttnBlock, Decoder, Downsample, Encoder, Upsample, norm

WIDTHS, BLOCKS = (32, 32, 64), 2
kinds = pytest.mark.parametrize("attention, eps", [((1, 2), 1e-6), ((), 1e-6), ((2,), 1e-5)])


def randomize(module: nn.Module) -> nn.Module:
    """Values large enough that each layer, bias and gain shows in the result."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        near = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        spread = 0.3 if parameter.ndim == 1 else 1.5 * parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, near, spread)
    return module.eval()


# --- the reference ---
def normalised(state: dict, name: str, x: Tensor) -> Tensor:
    """The state has the eps as well."""
    groups = x.reshape(len(x), 32, -1)
    centred = groups - groups.mean(2, keepdim=True)
    groups = centred / (centred.square().mean(2, keepdim=True) + state["eps"]).sqrt()
    scale, shift = (state[f"{name}.{kind}"].view(1, -1, 1, 1) for kind in ("weight", "bias"))
    return groups.reshape(x.shape) * scale + shift


def convolved(state: dict, name: str, x: Tensor, padding: int = 1, stride: int = 1) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=stride, padding=padding)


def swish(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def residual(state: dict, name: str, x: Tensor) -> Tensor:
    path = convolved(state, f"{name}.conv1", swish(normalised(state, f"{name}.norm1", x)))
    path = convolved(state, f"{name}.conv2", swish(normalised(state, f"{name}.norm2", path)))
    narrow = f"{name}.nin_shortcut.weight" in state
    return path + (convolved(state, f"{name}.nin_shortcut", x, 0) if narrow else x)


def attended(state: dict, name: str, x: Tensor) -> Tensor:
    h = normalised(state, f"{name}.norm", x)
    q, k, v = (convolved(state, f"{name}.{part}", h, 0).flatten(2) for part in "qkv")  # (B, C, HW)
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5, 2)
    mixed = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
    return x + convolved(state, f"{name}.proj_out", mixed, 0)


def level(state: dict, name: str, x: Tensor, blocks: int) -> Tensor:
    for i in range(blocks):
        x = residual(state, f"{name}.block.{i}", x)
        x = attended(state, f"{name}.attn.{i}", x) if f"{name}.attn.{i}.q.weight" in state else x
    return x


def middle(state: dict, x: Tensor) -> Tensor:
    return residual(state, "mid.block_2", attended(state, "mid.attn_1", residual(state, "mid.block_1", x)))


def slow_encoder(state: dict, x: Tensor) -> Tensor:
    x = convolved(state, "conv_in", x)
    for i in range(3):
        x = level(state, f"down.{i}", x, BLOCKS)
        if i < 2:
            x = convolved(state, f"down.{i}.downsample.conv", F.pad(x, (0, 1, 0, 1)), 0, 2)
    return convolved(state, "conv_out", swish(normalised(state, "norm_out", middle(state, x))))


def slow_decoder(state: dict, x: Tensor) -> Tensor:
    x = middle(state, convolved(state, "conv_in", x))
    for i in (2, 1, 0):
        x = level(state, f"up.{i}", x, BLOCKS + 1)
        if i > 0:
            grown = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = convolved(state, f"up.{i}.upsample.conv", grown)
    return convolved(state, "conv_out", swish(normalised(state, "norm_out", x)))


# --- properties ---
@torch.no_grad()
@kinds
def test_the_encoder_equals_the_slow_reference(attention, eps):
    encoder = randomize(Encoder(widths=WIDTHS, blocks=BLOCKS, attention=attention, out=6, eps=eps)).double()
    image = torch.rand(2, 3, 16, 24, dtype=torch.double)
    expected = slow_encoder({**encoder.state_dict(), "eps": eps}, image)
    assert expected.shape == (2, 6, 4, 6) and expected.std() > 0.1
    torch.testing.assert_close(encoder(image), expected, atol=1e-9, rtol=1e-9)  # in double, so that the eps shows


@torch.no_grad()
@pytest.mark.parametrize("out", [3, 12])
@kinds
def test_the_decoder_equals_the_slow_reference(out, attention, eps):
    sizes = dict(channels=5, widths=WIDTHS, blocks=BLOCKS, attention=attention, out=out, eps=eps)
    decoder = randomize(Decoder(**sizes)).double()
    latents = torch.randn(2, 5, 4, 6, dtype=torch.double)
    expected = slow_decoder({**decoder.state_dict(), "eps": eps}, latents)
    assert expected.shape == (2, out, 16, 24) and expected.std() > 0.1
    torch.testing.assert_close(decoder(latents), expected, atol=1e-9, rtol=1e-9)


def test_norms_have_tamings_eps_unless_told_and_not_torchs():
    faint = 1e-3 * torch.randn(1, 32, 8, 8)  # of a variance that the eps is equal to
    variance = (faint - faint.mean((2, 3), keepdim=True)).square().mean((2, 3), keepdim=True)
    expected = (faint - faint.mean((2, 3), keepdim=True)) / (variance + 1e-6).sqrt()
    torch.testing.assert_close(norm(32)(faint), expected, atol=1e-4, rtol=1e-4)
    expected = (faint - faint.mean((2, 3), keepdim=True)) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(norm(32, eps=1e-5)(faint), expected, atol=1e-4, rtol=1e-4)


def test_attention_is_a_convex_mixture_of_all_places():
    block = randomize(AttnBlock(32))
    with torch.no_grad():
        for part in (block.q, block.k):  # no place is preferred: the mixture is the mean
            nn.init.zeros_(part.weight)
        x = torch.randn(1, 32, 3, 5)
        mean = block.v(block.norm(x)).mean((2, 3), keepdim=True)
        torch.testing.assert_close(block(x), x + block.proj_out(mean), atol=1e-5, rtol=1e-5)


def test_downsampling_pads_on_the_right_and_below_only():
    layer = Downsample(1)
    nn.init.ones_(layer.conv.weight)
    nn.init.zeros_(layer.conv.bias)
    found = layer(torch.ones(1, 1, 4, 4)).detach()
    assert found[0, 0].tolist() == [[9, 6], [6, 4]]


def test_upsampling_repeats_pixels_before_it_convolves():
    layer = Upsample(1)
    nn.init.zeros_(layer.conv.bias)
    with torch.no_grad():
        layer.conv.weight.copy_(torch.tensor([[0.0, 0, 0], [0, 1, 0], [0, 0, 0]])[None, None])
    found = layer(torch.tensor([[[[1.0, 2.0]]]])).detach()
    assert found[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]
