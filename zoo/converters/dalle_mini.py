"""Published weights of DALL-E mini and mega -> ours. A state maps names to tensors; our config is what DalleMiniConfig
takes.

Two sources, each of which keeps its VQGAN in a file of its own, whose tensors are called vqgan.* here:
    borisdayma/dalle-mini    flax_model.msgpack: model/encoder/..., the layers of a half stacked in one tensor and
                             linear layers transposed; the VQGAN is dalle-mini/vqgan_imagenet_f16_16384, flax too
    kuprel/min-dalle         encoder.pt and decoder.pt, half precision, whose tensors are called encoder.* and decoder.*
                             here; of the VQGAN the half that draws, detoker.pt
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.converters import vqgan
from zoo.errors import WeightsMismatch

State = dict[str, Tensor]

OURS, PICTURES = "transformer.", "vqgan."
HALVES = ("encoder.", "decoder.")
HEAD_WIDTH = 64  # of both published sizes
# The first row after the codes is the start token's: tools/train/config of the source, and PaddleNLP's port, say so for
# mini and mega; training shifted the codes by it (data.py). min-dalle starts from 16383, a code, since its 0.4.11.
START = 16384
PAD = 1  # of BART's tokenizer; the source's pad_token_id is one of codes, and never used
# What the network of a config.json of the source does that shapes cannot tell: all else is another network.
SUPPOSED = {
    "activation_function": "gelu",
    "ln_positions": "normformer",
    "ln_type": "layernorm",
    "scale_embedding": False,
    "sinkhorn_iters": 1,
    "use_cosine_attention": False,
    "use_deepnet_scaling": False,
}
# flax's names -> min-dalle's, in order; those within a gated layer first.
FLAX = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"GLU_0/LayerNorm_(\d)/", r"glu.ln\1."),
        (r"GLU_0/Dense_(\d)/", r"glu.fc\1."),
        (r"FlaxBartAttention_0/(\w+)/", r"self_attn.\1."),
        (r"FlaxBartAttention_1/(\w+)/", r"encoder_attn.\1."),
        (r"LayerNorm_0/", "pre_self_attn_layer_norm."),
        (r"LayerNorm_1/", "self_attn_layer_norm."),
        (r"LayerNorm_2/", "pre_encoder_attn_layer_norm."),
        (r"LayerNorm_3/", "encoder_attn_layer_norm."),
        (r"(kernel|scale|embedding)$", "weight"),
        (r"/", "."),
    )
)
STACKED = re.compile(r"^layers/FlaxBart(?:En|De)coderLayers/(.*)$")
ALONE = re.compile(r"^layers/FlaxBart(?:En|De)coderLayer_(\d+)/(.*)$")
# Ours <- theirs, put one below the other where there are several.
ENDS = {
    "embed.weight": ("embed_tokens.weight",),
    "positions.weight": ("embed_positions.weight",),
    "norm_in.weight": ("layernorm_embedding.weight",),
    "norm_in.bias": ("layernorm_embedding.bias",),
    "norm_out.bias": ("final_ln.bias",),
    "head.weight": ("lm_head.weight",),
}
BLOCK = {
    "norm_in.bias": ("pre_self_attn_layer_norm.bias",),
    "attention.qkv.weight": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
    "attention.out.weight": ("self_attn.out_proj.weight",),
    "norm_out.weight": ("self_attn_layer_norm.weight",),
    "norm_out.bias": ("self_attn_layer_norm.bias",),
    "cross_norm_in.bias": ("pre_encoder_attn_layer_norm.bias",),
    "cross.q.weight": ("encoder_attn.q_proj.weight",),
    "cross.kv.weight": ("encoder_attn.k_proj.weight", "encoder_attn.v_proj.weight"),
    "cross.out.weight": ("encoder_attn.out_proj.weight",),
    "cross_norm_out.weight": ("encoder_attn_layer_norm.weight",),
    "cross_norm_out.bias": ("encoder_attn_layer_norm.bias",),
    "gated.norm_in.bias": ("glu.ln0.bias",),
    "gated.up.weight": ("glu.fc0.weight", "glu.fc1.weight"),
    "gated.norm_hidden.bias": ("glu.ln1.bias",),
    "gated.down.weight": ("glu.fc2.weight",),
}
# The tensors whose shapes say the sizes.
MARKS = (
    "encoder.embed.weight",
    "encoder.positions.weight",
    "decoder.embed.weight",
    "decoder.positions.weight",
    "encoder.blocks.0.gated.down.weight",
)


def to_ours(state: Mapping[str, Tensor], config: Mapping) -> tuple[State, dict[str, Any]]:
    """A state of either source (or ours), and what its files or its card say -> our state and config.

    Sizes come from shapes. A config.json of the source says the heads, of 64 where it does not, the start token and the
    spread of the first weights; ours says what is not of the network too. What is not known keeps its name, so that
    strict loading reports it.
    Raises WeightsMismatch for weights of another kind or without a VQGAN, and for a config.json of another network.
    """
    if others := [f"{name}={config[name]!r}" for name, value in SUPPOSED.items() if config.get(name, value) != value]:
        raise WeightsMismatch(f"the config.json is of another network than DALL-E mini's: {', '.join(others)}")
    prefix = "dvae." if any(name.startswith(OURS) for name in state) else PICTURES
    pictures = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    words = {name.removeprefix("params/"): t for name, t in state.items() if not name.startswith(prefix)}
    if any(name.startswith("model/") for name in words):
        words = _from_flax(words)
    if not any(name.startswith(OURS) for name in words):
        words = _renamed(words)
    _check(words, pictures)
    pictures, image = vqgan.to_ours(pictures, config.get("image") or {})
    transformer = _sizes(words, config, image["vocab"])
    state = words | {f"dvae.{name}": tensor for name, tensor in pictures.items()}
    return state, {
        "image": image | {"size": transformer["grid"] << len(image["widths"]) - 1},
        "transformer": transformer,
        **{name: config[name] for name in ("caption_dropout", "code_dropout", "empty", "guidance") if name in config},
    }


def _from_flax(state: State) -> State:
    """flax's names and tensors -> min-dalle's."""
    theirs: State = {}
    for name, tensor in state.items():
        # Outside the two halves, below model/, is the output layer alone.
        half, _, rest = (
            name.removeprefix("model/").partition("/") if name.startswith("model/") else ("decoder", "", name)
        )
        layers = {_spelled(rest): tensor}
        if stacked := STACKED.match(rest):
            layers = {f"layers.{number}.{_spelled(stacked[1])}": layer for number, layer in enumerate(tensor)}
        elif alone := ALONE.match(rest):
            layers = {f"layers.{alone[1]}.{_spelled(alone[2])}": tensor}
        turned = rest.endswith("/kernel")
        theirs |= {f"{half}.{their}": layer.T if turned else layer for their, layer in layers.items()}
    return theirs


def _spelled(name: str) -> str:
    for pattern, theirs in FLAX:
        name = pattern.sub(theirs, name)
    return name


def _renamed(state: State) -> State:
    """min-dalle's names -> ours, with queries, keys and values, and the halves of a gate, as one tensor."""
    left, ours = dict(state), {}
    for half in HALVES:
        tables = [("", "", ENDS)]
        tables += [(f"blocks.{i}.", f"layers.{i}.", BLOCK) for i in range(_depth(left, f"{half}layers"))]
        for here, there, table in tables:
            for name, theirs in table.items():
                wanted = [half + there + their for their in theirs]
                if all(their in left for their in wanted):
                    parts = [left.pop(their) for their in wanted]
                    ours[OURS + half + here + name] = torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()
    return ours | left


def _depth(state: State, blocks: str) -> int:
    numbers = (re.match(rf"{re.escape(blocks)}\.(\d+)\.", name) for name in state)
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def _check(words: State, pictures: State) -> None:
    some = ", ".join(sorted(words)[:3]) or "none"
    if any(OURS + name not in words for name in MARKS):
        raise WeightsMismatch(
            f"these {len(words)} tensors ({some}, ...) are not the two halves of a DALL-E mini: name the folder that "
            "holds encoder.pt, decoder.pt and detoker.pt of min-dalle, or flax_model.msgpack of the source"
        )
    if not pictures:
        raise WeightsMismatch(
            "this DALL-E mini lacks its VQGAN: put detoker.pt of min-dalle beside its encoder.pt and decoder.pt, and "
            "flax_model.msgpack of dalle-mini/vqgan_imagenet_f16_16384, as vqgan.msgpack, beside that of the source"
        )


def _sizes(state: State, config: Mapping, vocab: int) -> dict[str, Any]:
    (text_vocab, width), (text_length, _), (rows, _), (length, _), (_, hidden) = (state[OURS + n].shape for n in MARKS)
    said = config.get("transformer") or {}
    # min-dalle's folder holds mega's config.json beside the files of both sizes.
    theirs = config if config.get("d_model", width) == width else {}
    return {
        "text_vocab": text_vocab,
        "text_length": text_length,
        "pad": said.get("pad", PAD),
        "vocab": vocab,
        "rows": rows,
        "start": theirs.get("decoder_start_token_id", said.get("start", START)),
        "grid": math.isqrt(length),
        "width": width,
        "depth": _depth(state, f"{OURS}encoder.blocks"),
        "heads": theirs.get("encoder_attention_heads", said.get("heads", width // HEAD_WIDTH)),
        "hidden": hidden,
        "init_std": theirs.get("init_std", said.get("init_std", 0.02)),
    }
