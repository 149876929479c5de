"""LoRA beside linear layers: it begins as nothing, it alone is trained, and it leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.blocks.lora import LoraLinear, add_lora, lora_state, remove_lora
from zoo.errors import SettingsError
from zoo.models.unet import UNet, UNetConfig

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
SIZES = UNetConfig(widths=(8, 12), blocks=1, attention=(1,), heads=(2, 2), context=10, groups=4, linear=True)


def make() -> UNet:
    """A UNet that says something."""
    torch.manual_seed(0)
    model = UNet(SIZES)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=draw), torch.tensor([3, 800]), torch.randn(2, 5, 10, generator=draw)


def trained(module: nn.Module) -> None:
    """As if it had been: `up` is no longer 0."""
    torch.manual_seed(2)
    for layer in module.modules():
        if isinstance(layer, LoraLinear):
            nn.init.normal_(layer.up.weight, std=0.3)


def test_it_begins_where_the_base_was():
    model = make()
    before = model(*inputs())
    add_lora(model, ATTENTION, rank=3, alpha=6)
    assert model(*inputs()).equal(before)


def test_it_is_the_layer_with_the_product_added():
    torch.manual_seed(0)
    lora = LoraLinear(nn.Linear(5, 7), rank=2, scale=1.5)
    trained(lora)
    x = torch.randn(3, 4, 5)
    weight = lora.base.weight + 1.5 * lora.up.weight @ lora.down.weight
    torch.testing.assert_close(lora(x), nn.functional.linear(x, weight, lora.base.bias))


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (6, 2.0), (1.5, 0.5)])
def test_the_scale_is_alpha_over_rank(alpha: float | None, scale: float):
    model = nn.ModuleDict({"to_q": nn.Linear(5, 7, bias=False)})
    weight = model["to_q"].weight.clone()
    down, up = add_lora(model, ["to_q"], rank=3, alpha=alpha)
    trained(model)
    torch.testing.assert_close(model["to_q"](torch.eye(5)), (weight + scale * up @ down).T)


def test_a_half_precision_base_is_trained_in_fp32():
    lora = LoraLinear(nn.Linear(5, 7).bfloat16(), rank=2, scale=1.0)
    trained(lora)
    found = lora(torch.randn(3, 5).bfloat16())
    found.float().sum().backward()
    assert found.dtype == torch.bfloat16 and {lora.up.weight.grad.dtype, lora.down.weight.grad.dtype} == {torch.float32}


def test_it_alone_is_trained():
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    added = add_lora(model, ATTENTION, rank=3)
    assert {id(p) for p in added} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(added) == 2 * 4 * 2 * 4  # halves, layers of an attention, attentions of a block, blocks
    assert {tuple(p.shape) for p in added} == {(3, 12), (12, 3), (3, 10)}
    optimizer = torch.optim.SGD(added, lr=10.0)
    for _ in range(2):  # until `up` has moved, `down` has no gradient
        optimizer.zero_grad()
        model(*inputs()).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in added)
    remove_lora(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(after[name].equal(before[name]) for name in before)


def test_what_is_saved_is_what_diffusers_adds():
    diffusers = pytest.importorskip("diffusers")
    original = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 12),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=10,
        norm_num_groups=4,
        use_linear_projection=True,
    )
    model = make()
    original.load_state_dict(model.state_dict())
    add_lora(model, (*ATTENTION, "proj", "net.2"), rank=3, alpha=1.5)
    trained(model)
    state = lora_state(model, "unet.")
    layers = dict(original.named_modules())
    assert len(state) == 2 * 4 * 10
    for name, down in state.items():
        if name.endswith(".lora_A.weight"):
            layer = layers[name.removeprefix("unet.").removesuffix(".lora_A.weight")]
            layer.weight.data += state[name.replace("lora_A", "lora_B")] @ down  # no alpha in the file: a scale of 1
    latents, timesteps, context = inputs()
    with torch.no_grad():
        found, expected = model(latents, timesteps, context), original(latents, timesteps, context).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_queries_keys_and_values_that_are_one_layer_have_lora_each():
    torch.manual_seed(0)
    model = nn.ModuleDict({"qkv": nn.Linear(4, 18), "proj": nn.Linear(4, 18)})
    before = {name: (layer.weight.detach().clone(), layer.bias.detach().clone()) for name, layer in model.items()}
    added = add_lora(model, ["qkv", "proj"], rank=2, alpha=5)
    assert [tuple(p.shape) for p in added] == [(6, 4), (18, 2), (2, 4), (18, 2)]
    trained(model)
    x, (down, up) = torch.randn(3, 4), (p.detach() for p in added[:2])
    for part in range(3):  # y = W x + b + alpha / r * B A x, of each by itself
        rows, ranks = slice(6 * part, 6 * part + 6), slice(2 * part, 2 * part + 2)
        weight = before["qkv"][0][rows] + 2.5 * up[rows] @ down[ranks]
        expected = x @ weight.T + before["qkv"][1][rows]
        torch.testing.assert_close(model["qkv"](x)[:, rows], expected)
    state = lora_state(model)
    for name, (weight, bias) in before.items():
        whole = weight + state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"]
        torch.testing.assert_close(model[name](x), x @ whole.T + bias)


def test_targets_are_whole_names():
    model = nn.ModuleDict({"to_q": nn.Linear(2, 2), "not_to_q": nn.Linear(2, 2), "q": nn.Linear(2, 2)})
    add_lora(model, ["to_q"], rank=1)
    assert [name for name, layer in model.items() if isinstance(layer, LoraLinear)] == ["to_q"]


def test_mistakes_are_named():
    model = nn.ModuleDict({"to_q": nn.Linear(2, 2), "proj": nn.Linear(2, 2)})
    with pytest.raises(SettingsError, match="1 or more, not 0"):
        add_lora(model, ["to_q"], rank=0)
    with pytest.raises(SettingsError, match="ends in to_k; theirs end in: proj, to_q"):
        add_lora(model, ["to_k"], rank=1)
    assert all(parameter.requires_grad for parameter in model.parameters())
    add_lora(model, ["to_q"], rank=1)
    with pytest.raises(SettingsError, match="LoRA already"):
        add_lora(model, ["proj"], rank=1)
