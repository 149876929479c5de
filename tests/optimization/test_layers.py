from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from zoo.optimization.layers import ChannelsLastConv2d, SdpaAttention, SharedLinear

B, T, S, D, H = 2, 5, 7, 8, 2
LATER = torch.ones(T, T, dtype=torch.bool).triu(1)
PADDED = torch.arange(T) >= torch.tensor([[3], [5]])  # (B, T)


def both(batch_first: bool = True, **settings: object) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(D, H, batch_first=batch_first, **settings)
    nn.init.normal_(plain.in_proj_bias) if plain.in_proj_bias is not None else None
    fast = copy.deepcopy(plain)
    fast.__class__ = SdpaAttention
    return plain, fast


def outputs_and_gradients(layer: nn.Module, *inputs: Tensor, **settings: object) -> list[Tensor]:
    x = layer(*inputs, **settings)
    x = x[0] if isinstance(x, tuple) else x
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    return [x, *torch.autograd.grad(x, list(layer.parameters()), direction)]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "masks",
    [
        {},
        {"attn_mask": LATER},
        {"attn_mask": LATER, "is_causal": True},
        {"attn_mask": torch.randn(T, T)},
        {"attn_mask": torch.randn(B * H, T, T)},
        {"key_padding_mask": PADDED},
        {"key_padding_mask": PADDED, "attn_mask": LATER},
        {"key_padding_mask": PADDED, "attn_mask": LATER, "is_causal": True},
    ],
    ids=lambda masks: "+".join(masks) or "none",
)
def test_attention_equals_torchs_under_every_mask(batch_first: bool, masks: dict[str, object]):
    plain, fast = both(batch_first)
    x = torch.randn(B, T, D) if batch_first else torch.randn(T, B, D)
    expected = outputs_and_gradients(plain, x, x, x, need_weights=False, **masks)
    torch.testing.assert_close(outputs_and_gradients(fast, x, x, x, need_weights=False, **masks), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_attention_across_equals_torchs(bias: bool):
    plain, fast = both(bias=bias)
    x, context, other = torch.randn(B, T, D), torch.randn(B, S, D), torch.randn(B, S, D)
    for keys, values in ((context, context), (context, other)):
        expected = outputs_and_gradients(plain, x, keys, values, need_weights=False)
        torch.testing.assert_close(outputs_and_gradients(fast, x, keys, values, need_weights=False), expected)


@pytest.mark.parametrize("settings", [{"kdim": S, "vdim": S}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention_of_rare_kinds_is_left_to_torch(settings: dict[str, object]):
    plain, fast = both(**settings)
    x, context = torch.randn(B, T, D), torch.randn(B, T, settings.get("kdim", D))
    torch.testing.assert_close(fast(x, context, context), plain(x, context, context))


def test_attention_weights_are_given_where_they_are_asked_for():
    plain, fast = both()
    x = torch.randn(B, T, D)
    torch.testing.assert_close(fast(x, x, x, need_weights=True)[1], plain(x, x, x)[1])
    assert fast(x, x, x)[1] is None


def test_attention_drops_only_in_training():
    _, fast = both(dropout=0.5)
    x = torch.randn(B, T, D)
    assert not torch.equal(fast(x, x, x)[0], fast(x, x, x)[0])
    fast.eval()
    assert torch.equal(fast(x, x, x)[0], fast(x, x, x)[0])


class Three(nn.Module):
    """x -> q, k, v, of different widths."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, width, bias=bias) for width in (8, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.k(x), self.v(x)], -1)


def shared(bias: bool = True) -> tuple[Three, Three]:
    torch.manual_seed(0)
    plain = Three(bias)
    fast = copy.deepcopy(plain)
    for layer in fast.children():
        layer.__class__, layer.group = SharedLinear, tuple(fast.children())
    return plain, fast


@pytest.mark.parametrize("bias", [True, False])
def test_shared_layers_equal_separate_ones_in_one_product(bias: bool, monkeypatch: pytest.MonkeyPatch):
    plain, fast = shared(bias)
    x = torch.randn(B, T, D)
    expected = outputs_and_gradients(plain, x)
    products = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr("torch.nn.functional.linear", lambda *args: products.append(args) or linear(*args))
    torch.testing.assert_close(outputs_and_gradients(fast, x), expected)
    assert len(products) == 1


def test_a_shared_result_is_not_used_after_its_input_or_a_weight_changed():
    plain, fast = shared()
    x = torch.randn(B, T, D)
    fast.q(x)
    x.mul_(2)
    torch.testing.assert_close(fast.k(x), plain.k(x))
    fast.q(x)
    with torch.no_grad():
        fast.v.weight.zero_()
    torch.testing.assert_close(fast.v(x), fast.v.bias.expand(B, T, -1))


def test_a_shared_result_made_without_gradients_is_not_used_with_them():
    _, fast = shared()
    x = torch.randn(B, T, D)
    with torch.no_grad():
        fast.q(x)
    assert fast.k(x).requires_grad


def test_shared_layers_whose_neighbours_are_not_whole_work_alone():
    plain, fast = shared()
    fast.k.weight.data = torch.empty(0)
    x = torch.randn(B, T, D)
    torch.testing.assert_close(fast.q(x), plain.q(x))


def test_shared_layers_that_are_copied_share_among_the_copies():
    _, fast = shared()
    twin = copy.deepcopy(fast)
    assert twin.q.group == (twin.q, twin.k, twin.v)


def test_a_channels_last_convolution_equals_the_plain_one():
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3)
    fast = copy.deepcopy(plain)
    fast.__class__ = ChannelsLastConv2d
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(outputs_and_gradients(fast, x), outputs_and_gradients(plain, x))
    assert fast(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fast(x[0]), plain(x[0]))
