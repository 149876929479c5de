"""Winograd's algorithm against torch's convolution."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.blocks import packed as module
from zoo.blocks import winograd
from zoo.blocks.packed import packed


@pytest.mark.parametrize("numbers", [1, winograd.NUMBERS_AT_ONCE])  # a row of tiles at a time, or all
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 10), (5, 5), (1, 1), (6, 3)])
def test_it_is_the_convolution(monkeypatch, height, width, numbers):
    monkeypatch.setattr(winograd, "NUMBERS_AT_ONCE", numbers)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 5, height, width), torch.randn(4, 5, 3, 3), torch.randn(4)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = winograd.convolve(x.contiguous(memory_format=layout), winograd.transform(weight), bias)
        torch.testing.assert_close(found, F.conv2d(x, weight, bias, padding=1), rtol=1e-5, atol=1e-5)
    bare = winograd.convolve(x, winograd.transform(weight), None)
    torch.testing.assert_close(bare, F.conv2d(x, weight, padding=1), rtol=1e-5, atol=1e-5)


def test_its_error_is_that_of_fp32():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 320, 16, 16), torch.randn(256, 320, 3, 3) / (9 * 320) ** 0.5
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    away = (winograd.convolve(x, winograd.transform(weight), None) - exact).norm() / exact.norm()
    assert away < 3e-6


def test_its_constants_are_on_the_cpu_whatever_the_defaults_are_where_it_is_imported():
    told = "import torch; torch.set_default_device('meta'); torch.set_default_dtype(torch.float64)\n"
    told += "from zoo.blocks.winograd import TILE, KERNEL, OUTPUT\n"
    told += "assert all(m.device.type == 'cpu' and m.dtype == torch.float32 for m in (TILE, KERNEL, OUTPUT))"
    subprocess.run([sys.executable, "-c", told], check=True)


def test_wide_convolutions_of_large_maps_take_it_and_no_others(monkeypatch):
    taken = []
    convolve = winograd.convolve
    monkeypatch.setattr(module.winograd, "convolve", lambda x, *rest: taken.append(x.shape) or convolve(x, *rest))
    channels, side = module.WINOGRAD_CHANNELS, round(module.WINOGRAD_PLACES**0.5)
    wide, narrow = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels // 2, 3, padding=1)
    others = [
        nn.Conv2d(channels, channels, 3, stride=2, padding=1),
        nn.Conv2d(channels, channels, 3),
        nn.Conv2d(channels, channels, 3, padding=1, groups=2),
        nn.Conv2d(channels, channels, 3, padding=2, dilation=2),
        nn.Conv2d(channels, channels, 1),
        narrow,
    ]
    large, small = torch.randn(1, channels, side, side), torch.randn(1, channels, side // 2, side)
    with torch.inference_mode():
        for layer, x in [(wide, large), (wide, small), *((other, large) for other in others)]:
            taken.clear()
            with packed(layer):
                torch.testing.assert_close(layer(x), F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding,
                                           layer.dilation, layer.groups), rtol=1e-5, atol=1e-5)  # fmt: skip
            assert bool(taken) == (layer is wide and x is large)
            assert "_winograd" not in vars(layer)
        half = wide.to(torch.bfloat16)
        taken.clear()
        with packed(half):
            half(large.bfloat16())
        assert not taken
