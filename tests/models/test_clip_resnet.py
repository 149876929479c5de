from __future__ import annotations

import pytest
import torch

from zoo.models.clip_resnet import Bottleneck, ModifiedResNet, ResNetConfig

TINY = ResNetConfig(size=64, layers=(1, 2, 1, 1), width=8)


@pytest.fixture(autouse=True)
def _same_numbers_each_time():
    torch.manual_seed(0)


def test_pictures_become_embeddings():
    assert ModifiedResNet(TINY, 10).eval()(torch.randn(2, 3, 64, 64)).shape == (2, 10)


def test_a_new_block_passes_on_its_shortcut():
    block = Bottleneck(32, 8, stride=1).eval()
    torch.nn.init.zeros_(block.bn3.weight)
    x = torch.randn(2, 32, 4, 4).relu()
    torch.testing.assert_close(block(x), x)


def test_a_strided_block_averages_before_its_last_convolution():
    block = Bottleneck(8, 4, stride=2).eval()
    assert all(conv.stride == (1, 1) for conv in (block.conv1, block.conv2, block.conv3, block.shortcut.conv))
    assert block(torch.randn(1, 8, 6, 6)).shape == (1, 16, 3, 3)


def test_residual_branches_start_at_zero():
    tower = ModifiedResNet(TINY, 10)
    assert all(bool((block.bn3.weight == 0).all()) for layer in tower.layers for block in layer)


def test_checkpointing_changes_neither_gradients_nor_statistics():
    image, found = torch.randn(4, 3, 64, 64), []
    start = ModifiedResNet(TINY, 10).state_dict()
    for enable in (False, True):
        tower = ModifiedResNet(TINY, 10)
        tower.load_state_dict(start)
        tower.checkpointing = enable
        tower(image).square().sum().backward()
        found.append(({n: p.grad for n, p in tower.named_parameters()}, tower.state_dict()))
    torch.testing.assert_close(found[0], found[1])


def test_the_groups_hold_every_parameter_once():
    tower = ModifiedResNet(TINY, 10)
    grouped = [id(p) for group in tower.groups for p in group.parameters()]
    assert sorted(grouped) == sorted(id(p) for p in tower.parameters())
