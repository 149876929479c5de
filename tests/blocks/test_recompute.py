from __future__ import annotations

import torch
from torch import nn

from zoo.blocks.recompute import recompute


def test_batch_norm_statistics_move_once():
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    again = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    again.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 5, 5)
    plain(x).square().sum().backward()
    recompute(again, x).square().sum().backward()
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor)
    assert again[1].num_batches_tracked == 1
    assert again[1].momentum == plain[1].momentum
    torch.testing.assert_close(again[0].weight.grad, plain[0].weight.grad)


def test_both_passes_draw_the_same_random_numbers():
    drawn = []

    def noisy(x):
        noise = torch.rand_like(x)
        drawn.append(noise)
        return (x * noise).sin()

    x = torch.randn(5, requires_grad=True)
    recompute(nn.Identity(), x, call=noisy).sum().backward()
    assert len(drawn) == 2
    assert torch.equal(*drawn)
