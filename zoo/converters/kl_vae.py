"""Published weights of Stable Diffusion's autoencoder <-> ours. A state maps names to tensors; our config is what
KlVaeConfig takes.

Layouts:
    CompVis     encoder.down.0.block.0.conv1.weight and so on: our names. Alone with the discriminator and LPIPS below
                loss., or first_stage_model. in the file of a whole model
    diffusers   encoder.down_blocks.0.resnets.0.conv1.weight and so on; the decoder's levels are counted from the
                smallest. The layers of its attention are matrices, or 1x1 convolutions, and in files of before 2023
                are called query, key, value and proj_attn

Sources: CompVis/latent-diffusion, ldm/models/autoencoder.py; diffusers, models/autoencoders/autoencoder_kl.py and
convert_from_ckpt.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoo.converters.modules import State, count, refuse, renamed, some, turned, unwrapped
from zoo.errors import WeightsMismatch

SIZE, SCALE, KL_WEIGHT = 512, 0.18215, 1e-6  # what no shape tells; SCALE is diffusers' own default too
WRAPPERS = ("state_dict.", "first_stage_model.", "vae.")
UNUSED = re.compile(r"loss\.|model_ema\.(decay|num_updates)$")
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_ATTENTION = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}
MATRIX = re.compile(r"\.(attn_1|attn\.\d+)\.(q|k|v|proj_out)\.weight$")
MARKS = ("decoder.conv_in.weight", "decoder.conv_out.weight", "encoder.conv_in.weight")
FIXED = {"act_fn": "silu", "mid_block_add_attention": True, "shift_factor": None}  # of an AutoencoderKL


def to_ours(state: Mapping[str, Tensor], config: Mapping) -> tuple[State, dict[str, Any]]:
    """A state of either layout (or ours), and what its files or its card say -> our state and config.

    Sizes come from shapes; from `config`, an AutoencoderKL's or ours, what shapes cannot tell: the pictures' side,
    `scale` (0.18215 unless it is said), `groups`, `eps` and `kl_weight`. Of the folder or file of a whole model it
    takes the autoencoder. What is not known keeps its name, so that strict loading reports it. Raises WeightsMismatch
    for weights of another kind.
    """
    state = {name: tensor for name, tensor in unwrapped(state, WRAPPERS).items() if not UNUSED.match(name)}
    config = {**config, **config.get("diffusers", {}).get("vae", {})}
    if any(".resnets." in name for name in state):
        levels, blocks = count(state, r"encoder\.down_blocks\.(\d+)\."), count(state, r".*\.resnets\.(\d+)\.")
        old = any(".query." in name for name in state)
        state = renamed(state, turned(_modules(levels, blocks, ATTENTION | OLD_ATTENTION if old else ATTENTION)))
    if any(mark not in state for mark in MARKS) or any(name.startswith("quantize.") for name in state):
        raise WeightsMismatch(
            f"these {some(state)} are not the autoencoder of a Stable Diffusion as diffusers or CompVis published it, "
            "nor zoo's own. Check that the file is of the model that was asked for; a VQ one is loaded as 'vqgan'"
        )
    refuse(config, FIXED, "autoencoder")
    ours = {name: t[:, :, None, None] if t.ndim == 2 and MATRIX.search(name) else t for name, t in state.items()}
    return ours, _config(ours, config)


def _config(state: State, config: Mapping) -> dict[str, Any]:
    levels = count(state, r"decoder\.up\.(\d+)\.")
    firsts = [state.get(f"decoder.up.{level}.block.0.conv1.weight") for level in range(levels)]
    if any(first is None for first in firsts):
        raise WeightsMismatch("the decoder of this autoencoder lacks a level; fetch the file again")
    return {
        "size": config.get("sample_size") or config.get("size", SIZE),
        "widths": tuple(first.shape[0] for first in firsts),
        "blocks": count(state, r"encoder\.down\.0\.block\.(\d+)\."),
        "attention": tuple(n for n in range(levels) if f"decoder.up.{n}.attn.0.norm.weight" in state),
        "latent": state["decoder.conv_in.weight"].shape[1],
        "eps": config.get("eps", 1e-6),
        "groups": config.get("norm_num_groups", config.get("groups", 32)),
        "quant": "quant_conv.weight" in state,
        "scale": config.get("scaling_factor", config.get("scale", SCALE)),
        "kl_weight": config.get("kl_weight", KL_WEIGHT),
    }


def to_diffusers(state: Mapping[str, Tensor], config: Mapping) -> tuple[State, dict[str, Any]]:
    """Our state and config -> those of an AutoencoderKL (its config.json). Raises WeightsMismatch for an eps that it
    does not have."""
    levels = len(config["widths"])
    kinds = ["Attn" * (level in config["attention"]) for level in range(levels)]
    if config["eps"] != 1e-6:
        raise WeightsMismatch(
            f"this autoencoder has norms with an eps of {config['eps']:g}; an AutoencoderKL has 1e-06"
        )
    flat = {name: tensor[:, :, 0, 0] if MATRIX.search(name) else tensor for name, tensor in state.items()}
    return renamed(flat, _modules(levels, config["blocks"] + 1, ATTENTION)), {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "block_out_channels": list(config["widths"]),
        "down_block_types": [f"{kind}DownEncoderBlock2D" for kind in kinds],
        "up_block_types": [f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)],
        "layers_per_block": config["blocks"],
        "latent_channels": config["latent"],
        "norm_num_groups": config["groups"],
        "sample_size": config["size"],
        "scaling_factor": config["scale"],
        "use_quant_conv": config["quant"],
        "use_post_quant_conv": config["quant"],
    }


def _modules(levels: int, blocks: int, attention: Mapping[str, str]) -> dict[str, str]:
    """Our modules -> diffusers', of levels of at most so many blocks; `attention`: its names of those layers."""
    found, attentions = {}, {}
    for half, ours, theirs, resize in (
        ("encoder", "down", "down_blocks", "downsample"),
        ("decoder", "up", "up_blocks", "upsample"),
    ):
        for level in range(levels):
            at = f"{half}.{ours}.{level}"
            to = f"{half}.{theirs}.{level if half == 'encoder' else levels - 1 - level}"
            found[f"{at}.{resize}.conv"] = f"{to}.{resize}rs.0.conv"
            for block in range(blocks):
                found |= _resnet(f"{at}.block.{block}", f"{to}.resnets.{block}")
                attentions[f"{at}.attn.{block}"] = f"{to}.attentions.{block}"
        found |= _resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0")
        found |= _resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1")
        attentions[f"{half}.mid.attn_1"] = f"{half}.mid_block.attentions.0"
        found[f"{half}.norm_out"] = f"{half}.conv_norm_out"
    for ours, theirs in attentions.items():
        found |= {f"{ours}.{a}": f"{theirs}.{b}" for a, b in attention.items()}
    return found


def _resnet(ours: str, theirs: str) -> dict[str, str]:
    return {ours: theirs, f"{ours}.nin_shortcut": f"{theirs}.conv_shortcut"}
