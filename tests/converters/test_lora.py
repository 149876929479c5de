"""Every dialect of LoRA files says the same: what diffusers' own conversion makes of a file, ours makes of it.

The weights' names are those of a Stable Diffusion of version 1's levels and blocks, with few channels.
"""

from __future__ import annotations

import re
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.blocks.lora import add_lora, lora_state
from zoo.converters.lora import Delta, split, to_ours
from zoo.errors import WeightsMismatch
from zoo.models.clip import TextConfig
from zoo.models.text_encoder import ClipTextEncoder
from zoo.models.unet import UNet, UNetConfig

conversion = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
state_dicts = pytest.importorskip("diffusers.utils.state_dict_utils")

WIDTH = 12
UNET = UNet(UNetConfig(widths=(4, 8, 12, 12), heads=(2, 2, 2, 2), context=10, groups=2))
TEXT = ClipTextEncoder(TextConfig(context=9, vocab=50, width=WIDTH, depth=2, heads=2))
NAMES = {f"unet.{name}" for name in UNET.state_dict()} | {f"text.{name}" for name in TEXT.state_dict()}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# Layers of kohya's files, in diffusers' and in CompVis's names (sd-scripts and LyCORIS).
KOHYA = [
    "down_blocks_0_attentions_0_proj_in",
    "down_blocks_2_attentions_1_transformer_blocks_0_ff_net_0_proj",
    "mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
    "up_blocks_3_attentions_2_transformer_blocks_0_attn1_to_out_0",
    "up_blocks_1_attentions_0_transformer_blocks_0_ff_net_2",
    "down_blocks_1_resnets_0_conv1",
    "up_blocks_2_resnets_2_conv_shortcut",
    "down_blocks_0_downsamplers_0_conv",
    "up_blocks_0_upsamplers_0_conv",
    "mid_block_resnets_1_time_emb_proj",
]
COMPVIS = {  # beside what diffusers turns round itself: openaimodel.py's names, and the published layers they are
    "input_blocks_0_0": "conv_in",
    "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks_5_0_in_layers_2": "down_blocks.1.resnets.1.conv1",
    "input_blocks_6_0_op": "down_blocks.1.downsamplers.0.conv",
    "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
    "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
    "output_blocks_2_1_conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks_5_2_conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks_11_0_emb_layers_1": "up_blocks.3.resnets.2.time_emb_proj",
    "time_embed_2": "time_embedding.linear_2",
    "out_2": "conv_out",
}


def halves(seed: int, rank: int = 2) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rank, WIDTH, generator=draw), torch.randn(WIDTH, rank, generator=draw)


def kohya(layers: list[str], prefix: str, alpha: float | None = 1.0) -> dict[str, Tensor]:
    state = {}
    for seed, layer in enumerate(layers):
        down, up = halves(seed)
        state |= {f"{prefix}{layer}.lora_down.weight": down, f"{prefix}{layer}.lora_up.weight": up}
        if alpha is not None:
            state[f"{prefix}{layer}.alpha"] = torch.tensor(alpha)
    return state


def original(state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """What diffusers makes of a file of kohya's: {layer: (down, up)}, by the steps of its load_lora_weights."""
    settings = type("Config", (), {"layers_per_block": 2})
    state = conversion._maybe_map_sgm_blocks_to_diffusers(dict(state), settings)
    state, _ = conversion._convert_non_diffusers_lora_to_diffusers(state)
    unet = {name: tensor for name, tensor in state.items() if name.startswith("unet.")}
    text = {name: tensor for name, tensor in state.items() if not name.startswith("unet.")}
    return peft(state_dicts.convert_unet_state_dict_to_peft(unet) | as_peft(text))


def as_peft(text: dict[str, Tensor]) -> dict[str, Tensor]:
    return state_dicts.convert_state_dict_to_peft(text) if text else {}


def peft(state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A state of PEFT's names, told otherwise. What its replacements leave of processors has no layer of its own."""
    state = {name.replace(".processor.", "."): tensor for name, tensor in state.items()}
    layers = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    assert len(state) == 2 * len(layers)
    return {layer: (state[f"{layer}.lora_A.weight"], state[f"{layer}.lora_B.weight"]) for layer in layers}


def published(name: str, rows: slice | None) -> str:
    """A place of ours in the published names, written out."""
    if name.startswith("unet."):
        assert rows is None
        return name.removesuffix(".weight")
    _, _, _, number, *layer, _ = name.split(".")
    letter = "" if rows is None else "qkv"[rows.start // WIDTH]
    assert rows is None or rows == slice(rows.start, rows.start + WIDTH)
    layer = {"attention.qkv": f"self_attn.{letter}_proj", "attention.out": "self_attn.out_proj"}.get(
        ".".join(layer)
    ) or {
        "mlp.up": "mlp.fc1",
        "mlp.down": "mlp.fc2",
    }[".".join(layer)]
    return f"text_encoder.text_model.encoder.layers.{number}.{layer}"


def told(deltas: dict[str, list[Delta]]) -> dict[str, tuple[Tensor, Tensor]]:
    assert deltas.keys() <= NAMES
    return {published(name, d.rows): (d.down, d.up) for name, parts in deltas.items() for d in parts}


def same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert all(a.equal(b) for layer in found for a, b in zip(found[layer], expected[layer], strict=True))


# --- dialects --------------------------------------------------------------------------------------------------------
def test_kohyas_unet_is_read_as_diffusers_reads_it():
    state = kohya(KOHYA, "lora_unet_")
    same(told(to_ours(state, NAMES)), original(state))


def test_compvis_names_are_read_as_diffusers_reads_them():
    inside = ("attn1_to_q", "attn2_to_out_0", "attn2_to_v", "ff_net_2")
    blocks = [f"input_blocks_{block}_1" for block in (1, 2, 4, 5, 7, 8)]
    blocks += ["middle_block_1", *(f"output_blocks_{block}_1" for block in range(3, 12))]
    state = kohya([f"{block}_transformer_blocks_0_{layer}" for block in blocks for layer in inside], "lora_unet_")
    same(told(to_ours(state, NAMES)), original(state))


def test_compvis_names_outside_of_attention():
    found = to_ours(kohya(list(COMPVIS), "lora_unet_"), NAMES)
    by_layer = {name: parts[0].down for name, parts in found.items()}
    assert len(by_layer) == len(COMPVIS)
    for seed, layer in enumerate(COMPVIS.values()):
        assert by_layer[f"unet.{layer}.weight"].equal(halves(seed)[0])


TEXT_LAYERS = ["self_attn_q_proj", "self_attn_k_proj", "self_attn_v_proj", "self_attn_out_proj", "mlp_fc1", "mlp_fc2"]


def test_kohyas_text_tower_is_read_as_diffusers_reads_it():
    layers = [f"text_model_encoder_layers_{number}_{layer}" for number in (0, 1) for layer in TEXT_LAYERS]
    state = kohya(layers, "lora_te_")
    found = to_ours(state, NAMES)
    same(told(found), original(state))
    rows = [delta.rows for delta in found["text.transformer.blocks.1.attention.qkv.weight"]]
    assert rows == [slice(0, WIDTH), slice(WIDTH, 2 * WIDTH), slice(2 * WIDTH, 3 * WIDTH)]


@pytest.mark.parametrize("form", ["lora_linear_layer.down", "to_lora.down", "lora_A", "lora_A.default"])
def test_text_towers_of_diffusers(form: str):
    state, expected = {}, {}
    for seed, theirs in enumerate(("q_proj", "v_proj", "out_proj")):
        layer, (down, up) = f"text_encoder.text_model.encoder.layers.1.self_attn.{theirs}", halves(seed)
        expected[layer] = down, up
        stem = f"{layer}.{form}"
        if form == "to_lora.down":  # the first that diffusers wrote
            stem = layer.replace(theirs, f"to_{theirs.removesuffix('_proj')}_lora.down")
        state[f"{stem}.weight"] = down
        state[f"{stem.replace('down', 'up').replace('lora_A', 'lora_B')}.weight"] = up
    same(told(to_ours(state, NAMES)), expected)
    if "default" not in form:
        same(peft(as_peft(state) if form != "lora_A" else state), expected)


@pytest.mark.parametrize("prefix", ["unet.", ""])
@pytest.mark.parametrize("form", [".lora.down", ".lora_A", ".processor.to_q_lora.down"])
def test_unets_of_diffusers(prefix: str, form: str):
    state, expected = {}, {}
    for seed, last in enumerate(ATTENTION):
        attention, (down, up) = "up_blocks.1.attentions.2.transformer_blocks.0.attn2", halves(seed)
        expected[f"unet.{attention}.{last}"] = down, up
        stem = f"{prefix}{attention}.{last}{form}"
        if "processor" in form:
            stem = f"{prefix}{attention}{form.replace('to_q', last.removesuffix('.0'))}"
        state |= {f"{stem}.weight": down, f"{stem.replace('down', 'up').replace('lora_A', 'lora_B')}.weight": up}
    same(told(to_ours(state, NAMES)), expected)
    if prefix and form != ".lora_A":
        same(peft(state_dicts.convert_unet_state_dict_to_peft(state)), expected)


def test_what_we_write_is_read():
    model = deepcopy(torch.nn.ModuleDict({"unet": UNET, "text": TEXT}))
    add_lora(model, ("attn1.to_q", "ff.net.2", "qkv", "mlp.down"), rank=3)
    state = lora_state(model)
    found = to_ours(state, NAMES)
    assert len(found) == len(state) / 2 == 16 * 2 + 2 * 2
    for name, (delta,) in found.items():
        layer = name.removesuffix(".weight")
        assert delta.down.equal(state[f"{layer}.lora_A.weight"]) and delta.up.equal(state[f"{layer}.lora_B.weight"])
        assert delta.rows is None and delta.scale == 1


def test_what_was_trained_is_split_into_weights_and_a_lora_that_diffusers_reads():
    torch.manual_seed(0)
    model = deepcopy(torch.nn.ModuleDict({"unet": UNET, "text": TEXT}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    add_lora(model, (*ATTENTION, "attention.qkv", "attention.out"), rank=3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(50, (2, 9))
    wanted = model["text"](tokens)
    merged, lora = split(model.state_dict())
    assert merged.keys() == before.keys()
    expected = {}
    for layer, (down, up) in peft(lora).items():  # by the published rule, W + B A
        if layer.startswith("unet."):
            expected[f"{layer}.weight"] = before[f"{layer}.weight"] + up @ down
            continue
        number, last = re.fullmatch(
            r"text_encoder\.text_model\.encoder\.layers\.(\d)\.self_attn\.(\w+)_proj", layer
        ).groups()
        name = f"text.transformer.blocks.{number}.attention.{'out' if last == 'out' else 'qkv'}.weight"
        rows = slice("qkvo".index(last[0]) % 3 * WIDTH, ("qkvo".index(last[0]) % 3 + 1) * WIDTH)
        expected.setdefault(name, before[name].clone())[rows] += up @ down
        assert down.shape == (3, WIDTH) and up.shape == (WIDTH, 3)
    assert len(peft(lora)) == 16 * 2 * 4 + 2 * 4
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected.get(name, before[name]))
    plain = ClipTextEncoder(TEXT.config)
    plain.load_state_dict({name[5:]: tensor for name, tensor in merged.items() if name.startswith("text.")})
    torch.testing.assert_close(plain(tokens), wanted, rtol=1e-4, atol=1e-5)
    found = to_ours(lora, NAMES)
    same(told(found), peft(lora))
    bert = {
        f"text.blocks.0.attention.qkv.{end}": torch.zeros(3, 3) for end in ("base.weight", "down.weight", "up.weight")
    }
    with pytest.raises(WeightsMismatch, match="no name for LoRA of text.blocks.0.attention.qkv"):
        split(bert)


# --- sums ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (2.0, 1.0), (1.0, 0.5), (8, 4.0)])
def test_the_scale_is_alpha_over_rank(alpha: float | None, scale: float):
    ((delta,),) = to_ours(kohya(KOHYA[:1], "lora_unet_", alpha), NAMES).values()
    down, up = halves(0)
    torch.testing.assert_close(delta.matrix(), scale * up @ down)
    half = Delta(down.half(), up.half(), scale)
    assert half.matrix().dtype == torch.float32  # products of fp16 files overflow and round in fp16
    torch.testing.assert_close(half.matrix(), scale * up.half().float() @ down.half().float())


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolutions_sum_is_its_two_convolutions(kernel: int):
    down, up, x = torch.randn(2, 5, kernel, kernel), torch.randn(7, 2, 1, 1), torch.randn(3, 5, 8, 8)
    delta = Delta(down, up, 0.5)
    assert delta.matrix().shape == delta.shape == (7, 5, kernel, kernel)
    torch.testing.assert_close(F.conv2d(x, delta.matrix()), 0.5 * F.conv2d(F.conv2d(x, down), up), rtol=1e-4, atol=1e-4)


# --- what is refused -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "kind"),
    [("dora_scale", "DoRA"), ("hada_w1_a", "LoHa"), ("lokr_w2", "LoKr"), ("lora_mid.weight", "Tucker")],
)
def test_other_kinds_are_named(name: str, kind: str):
    state = kohya(KOHYA[:1], "lora_unet_")
    with pytest.raises(WeightsMismatch, match=f"{kind}.*lora_unet_{KOHYA[0]}.{name}"):
        to_ours(state | {f"lora_unet_{KOHYA[0]}.{name}": torch.ones(WIDTH, 1)}, NAMES)


def test_unknown_names_are_listed():
    state = kohya(KOHYA[:1], "lora_unet_") | kohya(["input_blocks_4_1_transformer_blocks_9_attn1_to_q"], "lora_unet_")
    with pytest.raises(WeightsMismatch, match=r"3 of the 6 .*blocks_9_attn1_to_q\.alpha.*another base"):
        to_ours(state, NAMES)
    with pytest.raises(WeightsMismatch, match="another base"):
        to_ours({}, NAMES)
    with pytest.raises(WeightsMismatch, match="unet.conv_in.weight"):  # a whole model
        to_ours({"unet.conv_in.weight": torch.ones(4, 4, 3, 3)}, NAMES)


def test_halves_must_be_there_and_fit():
    state = kohya(KOHYA[:1], "lora_unet_")
    with pytest.raises(WeightsMismatch, match=r"unet.down_blocks.0.attentions.0.proj_in.weight has no up matrix"):
        to_ours({name: tensor for name, tensor in state.items() if "up" not in name.split(".")[1]}, NAMES)
    with pytest.raises(WeightsMismatch, match=r"do not fit each other: \(2, 12\) and \(12, 3\)"):
        to_ours(state | {f"lora_unet_{KOHYA[0]}.lora_up.weight": torch.ones(12, 3)}, NAMES)
    with pytest.raises(WeightsMismatch, match="twice"):
        to_ours(state | {"unet.down_blocks.0.attentions.0.proj_in.lora_A.weight": halves(0)[0]}, NAMES)
