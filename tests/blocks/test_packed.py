"""Packed weights: the same results from the same module, and nothing left of it after."""

import pytest
import torch
from torch import nn

from zoo.blocks import packed as own
from zoo.blocks.packed import packed


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(16, 8, 1),
        nn.Flatten(2),
        nn.Linear(16, 24),
        nn.Linear(24, 5, bias=False),
    )
    return layers.to(dtype).eval()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_packed_weights_give_what_plain_ones_give(dtype, tolerance, layout):
    net, x = network(dtype), torch.randn(2, 8, 8, 8, dtype=dtype).contiguous(memory_format=layout)
    with torch.inference_mode():
        expected = net(x)
        with packed(net):
            assert type(net[0]) is not nn.Conv2d  # it is done at all
            assert (type(net[4]) is nn.Linear) == (dtype == torch.float32)
            first, second = net(x), net(x)
    assert first.shape == expected.shape
    torch.testing.assert_close(first, expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(first, second)


def test_another_size_of_input_is_computed_right_too():
    net = network(torch.float32)[:3]
    small, large = torch.randn(1, 8, 4, 4), torch.randn(3, 8, 12, 6)
    with torch.inference_mode():
        expected = net(large)
        with packed(net):
            net(small)
            torch.testing.assert_close(net(large), expected, rtol=1e-5, atol=1e-5)


def test_afterwards_the_module_is_what_it_was_also_after_an_error():
    net = network(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.inference_mode(), pytest.raises(RuntimeError, match="on purpose"), packed(net):
        net(torch.randn(1, 8, 8, 8, dtype=torch.bfloat16))
        assert net.state_dict().keys() == before.keys()  # the copies are no part of the state
        raise RuntimeError("on purpose")
    assert [type(layer) for layer in net] == [nn.Conv2d] * 3 + [nn.Flatten, nn.Linear, nn.Linear]
    assert not any("_packed" in vars(layer) for layer in net)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_where_gradients_hooks_or_a_compiler_need_the_weights_nothing_is_packed():
    net = network(torch.float32)
    with packed(net):
        assert type(net[0]) is nn.Conv2d
    net._compiled_call_impl = net.forward  # as nn.Module.compile leaves it
    with torch.inference_mode(), packed(net):
        assert type(net[0]) is nn.Conv2d
    net._compiled_call_impl = None
    net[0].register_forward_pre_hook(lambda *_: None)
    with torch.inference_mode(), packed(net):
        assert type(net[0]) is nn.Conv2d and type(net[1]) is not nn.Conv2d


def test_where_the_copies_have_no_room_nothing_is_packed(monkeypatch):
    wide, narrow = nn.Conv2d(256, 256, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    for net, copies in ((wide, 256 * 256 * 16 * 4), (narrow, 8 * 8 * 9 * 4)):
        for free, is_packed in ((0.9 * own.SPARE * copies, False), (1.1 * own.SPARE * copies, True)):
            monkeypatch.setattr(own, "free_memory", lambda free=free: free)
            with torch.inference_mode(), packed(net):
                assert (type(net) is not nn.Conv2d) == is_packed
            assert type(net) is nn.Conv2d
