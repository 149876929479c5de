"""A blank model has every shape, no drawn numbers, and takes no memory until it is filled."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from zoo.weights import blank, load


class Net(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Embedding(width, width)
        self.attention = nn.MultiheadAttention(width, 2)
        self.conv = nn.Conv2d(width, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.token = nn.Parameter(width**-0.5 * torch.randn(width))
        self.other = nn.Parameter(torch.rand(width, 2, generator=torch.Generator()))
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.trunc_normal_(tensor=self.conv.weight)
        nn.init.xavier_normal_(self.conv.weight)
        self.register_buffer("positions", torch.arange(width) * 2, persistent=False)


def test_no_random_number_is_drawn():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    with blank():
        Net()
    assert torch.equal(torch.get_rng_state(), before)
    Net()
    assert not torch.equal(torch.get_rng_state(), before)


def test_a_bounded_drawing_does_not_wait_for_blank_numbers_to_fall_within():
    with blank():
        far = torch.full((4,), 1e9)
        nn.init.trunc_normal_(far)
    assert (far == 1e9).all()
    nn.init.trunc_normal_(far)
    assert (far.abs() <= 2).all()


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_waits_and_is_after_as_it_was(collects):
    (gc.enable if collects else gc.disable)()
    try:
        with pytest.raises(KeyError), blank():
            assert not gc.isenabled()
            raise KeyError
        assert gc.isenabled() == collects
    finally:
        gc.enable()


def test_what_is_not_random_is_as_ever():
    with blank():
        model = Net()
    usual = Net()
    assert torch.equal(model.positions, usual.positions) and torch.equal(model.norm.weight, usual.norm.weight)
    shapes = [{name: tensor.shape for name, tensor in net.state_dict().items()} for net in (model, usual)]
    assert shapes[0] == shapes[1] and all(parameter.requires_grad for parameter in model.parameters())


def test_a_blank_model_is_filled_by_load():
    original = Net()
    with blank():
        model = Net()
    load(model, original.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), original.parameters(), strict=True))


def resident() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident pages by /proc")
def test_a_blank_model_takes_no_memory():
    before = resident()
    with blank():
        model = nn.Sequential(nn.Linear(4096, 4096), nn.Embedding(4096, 4096))  # 128 MiB
    assert resident() - before < 2**25
    assert model[0].weight.shape == (4096, 4096)
