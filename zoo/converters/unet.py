"""Published weights of Stable Diffusion's UNet <-> ours. A state maps names to tensors; our config is what UNetConfig
takes.

Layouts:
    diffusers   conv_in.weight, down_blocks.0.resnets.0.conv1.weight and so on: our names. The two projections around
                transformer blocks are 1x1 convolutions there or matrices, as `use_linear_projection` says
    CompVis     input_blocks.0.0.weight and so on, model.diffusion_model. in the file of a whole model

Sources: diffusers, models/unets/unet_2d_condition.py; CompVis/stable-diffusion, openaimodel.py, and the v1 and v2
configs; Stability-AI/stablediffusion.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoo.converters.modules import State, below, count, refuse, renamed, some, turned, unwrapped
from zoo.errors import WeightsMismatch

WRAPPERS = ("state_dict.", "model.diffusion_model.", "unet.")
MARKS = ("conv_in.weight", "conv_out.weight", "time_embedding.linear_1.weight", "down_blocks.0.resnets.0.conv1.weight")
COMPVIS = "input_blocks.0.0.weight"
PROJECTION = re.compile(r"\.attentions\.\d+\.proj_(in|out)\.weight$")
CONTEXT = re.compile(r"\.attn2\.to_k\.weight$")
HEADS, HEAD_WIDTH = 8, 64  # of version 1 at every level, and of version 2, whose projections are matrices
RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"},
    **{"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
}
FIXED = {  # of a UNet2DConditionModel
    **{"act_fn": "silu", "norm_eps": 1e-5, "downsample_padding": 1, "mid_block_scale_factor": 1},
    **{"flip_sin_to_cos": True, "freq_shift": 0, "time_embedding_type": "positional", "center_input_sample": False},
    **{"resnet_time_scale_shift": "default", "resnet_skip_time_act": False, "only_cross_attention": False},
    **{"dual_cross_attention": False, "mid_block_only_cross_attention": None, "attention_type": "default"},
    **{"conv_in_kernel": 3, "conv_out_kernel": 3, "time_embedding_act_fn": None, "timestep_post_act": None},
    **{"class_embed_type": None, "addition_embed_type": None, "encoder_hid_dim_type": None},
}


def to_ours(state: Mapping[str, Tensor], config: Mapping) -> tuple[State, dict[str, Any]]:
    """A state of either layout (or ours), and what its files or its card say -> our state and config.

    Sizes come from shapes; from `config`, a UNet2DConditionModel's or ours, what shapes cannot tell: heads, else 8 at
    each level, or of width 64 where the projections are matrices, as in version 2; `groups`, `upcast` and `size`.
    What is not known keeps its name, so that strict loading reports it. Raises WeightsMismatch for weights of another
    kind.
    """
    state = unwrapped(state, WRAPPERS)
    if COMPVIS in state:
        state = renamed(state, turned(compvis_modules(*_compvis_sizes(state))))
    if any(mark not in state for mark in MARKS):
        raise WeightsMismatch(
            f"these {some(state)} are not the UNet of a Stable Diffusion as diffusers or CompVis published it, nor "
            "zoo's own. Check that the file is of the model that was asked for"
        )
    refuse(config, FIXED, "UNet")
    held = next((tensor.ndim for name, tensor in state.items() if PROJECTION.search(name)), 2)
    # [D, D, 1, 1] -> [D, D], a view
    ours = {name: tensor.flatten(1) if PROJECTION.search(name) else tensor for name, tensor in state.items()}
    return ours, _config(ours, config, linear=held == 2 and config.get("linear", True))


def _config(state: State, config: Mapping, linear: bool) -> dict[str, Any]:
    levels = count(state, r"down_blocks\.(\d+)\.")
    firsts = [state.get(f"down_blocks.{level}.resnets.0.conv1.weight") for level in range(levels)]
    contexts = [tensor.shape[1] for name, tensor in state.items() if CONTEXT.search(name)]
    if any(first is None for first in firsts) or not contexts:
        raise WeightsMismatch("this UNet lacks a level, or attention to a context; fetch the file again")
    widths = tuple(first.shape[0] for first in firsts)
    return {
        "channels": state["conv_in.weight"].shape[1],
        "out": state["conv_out.weight"].shape[0],
        "widths": widths,
        "blocks": count(state, r"down_blocks\.0\.resnets\.(\d+)\."),
        "attention": tuple(n for n in range(levels) if f"down_blocks.{n}.attentions.0.norm.weight" in state),
        "heads": _heads(widths, linear, config),
        "depth": count(state, r".*\.transformer_blocks\.(\d+)\."),
        "context": contexts[0],
        "mid": any(name.startswith("mid_block.") for name in state),
        "linear": linear,
        "upcast": bool(config.get("upcast_attention", config.get("upcast", False))),
        "groups": config.get("norm_num_groups", config.get("groups", 32)),
        "size": config.get("sample_size") or config.get("size", 64),
    }


def _heads(widths: tuple[int, ...], linear: bool, config: Mapping) -> tuple[int, ...]:
    # diffusers' `attention_head_dim` is the number of heads, whatever its name (diffusers issue 2011).
    said = config.get("num_attention_heads") or config.get("attention_head_dim") or config.get("heads")
    if said is None and "block_out_channels" in config:
        said = HEADS  # the class's own default
    if said is None:
        return tuple(width // HEAD_WIDTH if linear else HEADS for width in widths)
    return (said,) * len(widths) if isinstance(said, int) else tuple(said)


# --- writing ---------------------------------------------------------------------------------------------------------
def to_diffusers(state: Mapping[str, Tensor], config: Mapping) -> tuple[State, dict[str, Any]]:
    """Our state and config -> those of a UNet2DConditionModel (its config.json)."""
    levels, heads = len(config["widths"]), list(config["heads"])
    down = ["CrossAttnDownBlock2D" if n in config["attention"] else "DownBlock2D" for n in range(levels)]
    up = ["CrossAttnUpBlock2D" if n in config["attention"] else "UpBlock2D" for n in reversed(range(levels))]
    return _as_held(state, config), {
        "_class_name": "UNet2DConditionModel",
        **{name: only for name, only in FIXED.items() if only is not None},
        "in_channels": config["channels"],
        "out_channels": config["out"],
        "block_out_channels": list(config["widths"]),
        "layers_per_block": config["blocks"],
        "down_block_types": down,
        "up_block_types": up,
        "mid_block_type": "UNetMidBlock2DCrossAttn" if config["mid"] else None,
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "transformer_layers_per_block": config["depth"],
        "cross_attention_dim": config["context"],
        "use_linear_projection": config["linear"],
        "upcast_attention": config["upcast"],
        "norm_num_groups": config["groups"],
        "sample_size": config["size"],
    }


def to_compvis(state: Mapping[str, Tensor], config: Mapping) -> State:
    """Our state and config -> CompVis's names, as below model.diffusion_model. in its files. Raises WeightsMismatch for
    a UNet without middle, which CompVis's network always has."""
    if not config["mid"]:
        raise WeightsMismatch(
            "CompVis's UNet has a middle block and this one has none: hand it on as diffusers' folder"
        )
    return renamed(
        _as_held(state, config), compvis_modules(len(config["widths"]), config["blocks"], config["attention"])
    )


def _as_held(state: Mapping[str, Tensor], config: Mapping) -> State:
    """Projections as published files hold them."""
    return {
        name: tensor[:, :, None, None] if PROJECTION.search(name) and not config["linear"] else tensor
        for name, tensor in state.items()
    }


# --- CompVis's names -------------------------------------------------------------------------------------------------
def compvis_modules(levels: int, blocks: int, attention: tuple[int, ...]) -> dict[str, str]:
    """Our modules -> CompVis's, which number all blocks of the way down, and of the way up, in one row. `attention`:
    the levels that have it; after it comes what doubles the resolution."""
    row = blocks + 1
    found = {
        **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
        **{"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"},
        "mid_block.attentions.0": "middle_block.1",
    }
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    for level in range(levels):
        for block in range(row):
            ways = {"up": f"output_blocks.{row * level + block}"}
            if block < blocks:
                ways["down"] = f"input_blocks.{row * level + block + 1}"
            for way, theirs in ways.items():
                resnets[f"{way}_blocks.{level}.resnets.{block}"] = f"{theirs}.0"
                found[f"{way}_blocks.{level}.attentions.{block}"] = f"{theirs}.1"
        if level + 1 < levels:
            found[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{row * (level + 1)}.0.op"
            place = 1 + (levels - 1 - level in attention)
            found[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{row * level + blocks}.{place}.conv"
    for ours, theirs in resnets.items():
        found |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in RESNET.items()}
    return found


def _compvis_sizes(state: State) -> tuple[int, int, tuple[int, ...]]:
    """Levels, blocks of each, and the levels with attention, by CompVis's names."""
    halvings = sorted(
        int(found[1]) for name in state if (found := re.match(r"input_blocks\.(\d+)\.0\.op\.weight", name))
    )
    levels = len(halvings) + 1
    blocks = halvings[0] - 1 if halvings else count(state, r"input_blocks\.(\d+)\.") - 1
    norms = (f"input_blocks.{(blocks + 1) * level + 1}.1.norm.weight" for level in range(levels))
    return levels, blocks, tuple(level for level, norm in enumerate(norms) if norm in state)


# --- averages --------------------------------------------------------------------------------------------------------
AVERAGES = "model_ema."


def averaged(state: Mapping[str, Tensor], root: str) -> State:
    """What is below `root` of a CompVis file, from the averages beside it where there are any: they have its names
    without dots and without "model.". Raises WeightsMismatch where some lack."""
    raw, averages = below(state, root), below(state, AVERAGES)
    flat = {name: (root.removeprefix("model.") + name).replace(".", "") for name in raw}
    if not any(name in averages for name in flat.values()):
        return raw
    if missing := [name for name, theirs in flat.items() if theirs not in averages]:
        raise WeightsMismatch(
            f"this file has averages ({AVERAGES}*), but not of {len(missing)} tensors: {', '.join(missing[:8])}. Take "
            "its weights without averages, by the converter's ema=False"
        )
    return {name: averages[theirs] for name, theirs in flat.items()}
