from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.optimization.layers import SharedLinear
from zoo.optimization.replacements import convolutions, layer_attention, other_attention, shared_inputs


class Gated(nn.Module):
    """gate and up read x; down reads what they make; across reads another tensor; twice is called two times."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down, self.across, self.twice = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x, context):
        return self.down(self.gate(x) * self.up(x)) + self.across(context) + self.twice(self.twice(x))


def test_only_layers_that_read_the_same_tensor_share_a_product():
    model = nn.ModuleDict({"mlp": Gated()})
    run = lambda: model["mlp"](torch.ones(2, 4), torch.ones(2, 4))  # noqa: E731
    found = shared_inputs(model, run)
    assert found.where == ("mlp.{gate,up}",)
    undo = found.make()
    assert [n for n, m in model.named_modules() if isinstance(m, SharedLinear)] == ["mlp.gate", "mlp.up"]
    undo()
    assert not any(isinstance(m, SharedLinear) or "group" in vars(m) for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_layer_with_a_hook_shares_nothing():
    model = Gated()
    model.up.register_forward_pre_hook(lambda layer, args: None)
    assert shared_inputs(model, lambda: model(torch.ones(2, 4), torch.ones(2, 4))) is None


@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_attention_is_found_once_in_layers_or_outside(layer: type[nn.Module]):
    model = nn.ModuleList([layer(8, 2), nn.MultiheadAttention(8, 2)])
    assert all(path.startswith("0.") for path in layer_attention(model, None).where)
    assert other_attention(model, None).where == ("1",)


def test_a_subclass_is_left_alone():
    class Own(nn.MultiheadAttention):
        pass

    assert other_attention(Own(8, 2), None) is None


def test_a_lone_convolution_is_left_alone():
    assert convolutions(nn.Sequential(nn.Conv2d(3, 4, 3)), None) is None
    assert convolutions(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), None).where == ("0", "1")
