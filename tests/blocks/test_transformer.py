from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.blocks.transformer import Attention, Transformer


@pytest.fixture(autouse=True)
def _same_numbers_each_time():
    torch.manual_seed(0)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_torchs_multihead_attention(causal: bool):
    ours, theirs = Attention(16, 4, causal), nn.MultiheadAttention(16, 4, batch_first=True)
    theirs.in_proj_weight.data, theirs.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    theirs.out_proj.weight.data, theirs.out_proj.bias.data = ours.out.weight.data, ours.out.bias.data
    x = torch.randn(2, 5, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(5) if causal else None
    expected = theirs(x, x, x, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(ours(x), expected)


def test_what_the_mask_hides_changes_nothing():
    attention, x = Attention(16, 4), torch.randn(2, 5, 16)
    mask = torch.tensor([True, True, True, False, False])[None, None, None]
    other = torch.cat([x[:, :3], torch.randn(2, 2, 16)], 1)
    torch.testing.assert_close(attention(x, mask)[:, :3], attention(other, mask)[:, :3])
    assert not torch.allclose(attention(x)[:, :3], attention(other)[:, :3])


def test_a_causal_transformer_does_not_look_ahead():
    stack = Transformer(width=16, depth=2, heads=4, causal=True)
    x = torch.randn(1, 6, 16)
    torch.testing.assert_close(stack(x)[:, :4], stack(x[:, :4]))


def test_checkpointing_changes_neither_output_nor_gradients():
    stack, x = Transformer(width=16, depth=3, heads=4), torch.randn(2, 5, 16)
    found = []
    for stack.checkpointing in (False, True):
        stack.zero_grad()
        out = stack(x)
        out.square().sum().backward()
        found.append((out, *(p.grad.clone() for p in stack.parameters())))
    torch.testing.assert_close(found[0], found[1])


def test_a_checkpointed_block_runs_twice_and_only_while_training():
    stack, x = Transformer(width=8, depth=1, heads=2), torch.randn(1, 3, 8)
    stack.checkpointing = True
    calls = []
    stack.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    stack(x).sum().backward()
    assert len(calls) == 2
    stack.eval()(x).sum().backward()
    assert len(calls) == 3
