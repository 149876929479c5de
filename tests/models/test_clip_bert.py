from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.models.clip_bert import BertConfig, BertTransformer

BERT = BertConfig(vocab=50, width=32, depth=2, heads=4, positions=12, context=10)
XLMR = BertConfig(
    vocab=50,
    width=32,
    depth=2,
    heads=4,
    positions=14,
    context=12,
    first_position=2,
    types=1,
    pad=1,
    eps=1e-5,
    bridge=24,
)
both = pytest.mark.parametrize("config", [BERT, XLMR], ids=["bert", "xlmr"])


@pytest.fixture(autouse=True)
def _same_numbers_each_time():
    torch.manual_seed(0)


def tokens(config: BertConfig) -> torch.Tensor:
    """Two captions of 3 and 6 tokens, padded to the context."""
    found = torch.randint(2, config.vocab, (2, config.context))
    found[0, 3:], found[1, 6:] = config.pad, config.pad
    return found


@both
def test_padding_changes_nothing(config: BertConfig):
    tower, padded = BertTransformer(config, 8).eval(), tokens(config)
    alone = tower(padded[:1, :3])
    torch.testing.assert_close(tower(padded)[:1], alone)


@both
def test_nothing_is_computed_after_the_longest_caption(config: BertConfig):
    tower = BertTransformer(config, 8).eval()
    seen = []
    tower.norm_in.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    tower(tokens(config))
    assert seen == [6]


def test_xlm_roberta_counts_places_from_the_row_after_its_paddings():
    tower, caption = BertTransformer(XLMR, 8).eval(), tokens(XLMR)
    before = tower(caption)
    with torch.no_grad():
        tower.positions.weight[:2] += 1
    torch.testing.assert_close(tower(caption), before)
    with torch.no_grad():
        tower.positions.weight[2] += torch.randn(32)
    assert not torch.allclose(tower(caption), before)


@both
def test_every_norm_has_the_configs_epsilon(config: BertConfig):
    norms = [module for module in BertTransformer(config, 8).modules() if isinstance(module, nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {config.eps}


@both
def test_checkpointing_changes_neither_output_nor_gradients(config: BertConfig):
    tower, caption, found = BertTransformer(config, 8).train(), tokens(config), []
    for tower.checkpointing in (False, True):
        tower.zero_grad()
        out = tower(caption)
        out.square().sum().backward()
        found.append((out, *(p.grad.clone() for p in tower.parameters())))
    torch.testing.assert_close(found[0], found[1])


@both
def test_the_state_is_all_that_a_tower_holds(config: BertConfig):
    with torch.device("meta"):
        tower = BertTransformer(config, 8)
    assert {name for name, _ in tower.named_buffers()} == set()
    assert set(tower.state_dict()) == {name for name, _ in tower.named_parameters()}


@both
def test_the_groups_hold_every_parameter_once(config: BertConfig):
    tower = BertTransformer(config, 8)
    grouped = [id(p) for group in tower.groups for p in nn.ModuleList([group]).parameters()]
    assert sorted(grouped) == sorted(id(p) for p in tower.parameters())
