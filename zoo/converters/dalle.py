"""Published weights of DALL-Es with one stream of text and codes -> ours. A state maps names to tensors; our config is
what DalleConfig takes.

Two sources, each of which keeps its VQGAN in a file of its own, whose tensors are called vqgan.* here:
    kakaobrain/minDALL-E     stage2_last.ckpt: state_dict.blocks.0.attn.query.weight and so on; stage1_last.ckpt
    ai-forever/ru-dalle      pytorch_model_v3.bin: transformer.layers.0.attention.query_key_value.weight and so on, half
                             precision, with the masks that zoo computes; vqgan.gumbelf8-sber.model.ckpt

Ours are the two parts of a Dalle: transformer.*, and the image tokenizer as dvae.*.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.converters import vqgan
from zoo.errors import WeightsMismatch

State = dict[str, Tensor]
Table = dict[str, tuple[str, ...]]  # ours <- theirs, one below the other where there are several

OURS, OUR_PICTURES, PICTURES = "transformer.", "dvae.", "vqgan."
WRAPPERS = ("state_dict.", "module.")
OUR_FIELDS = ("image", "transformer", "caption_dropout", "code_dropout", "empty", "guidance")
MASKS = tuple(f"transformer.{pattern}_mask" for pattern in ("row", "col", "conv"))


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The names of a source. `marks`: those that tell it, and whose shapes tell the sizes. `fixed`: what its network is
    at any size. `files`: what to put into one folder."""

    ends: Table
    blocks: str
    block: Table
    marks: tuple[str, ...]
    fixed: Mapping[str, Any]
    files: str

    def pairs(self, depth: int) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Our names with theirs, of all tensors."""
        yield from self.ends.items()
        for number in range(depth):
            for name, theirs in self.block.items():
                yield f"blocks.{number}.{name}", tuple(f"{self.blocks}{number}.{their}" for their in theirs)


def both(table: Mapping[str, str | tuple[str, ...]]) -> Table:
    """Rows of layers -> rows of their weights and biases."""
    rows = {ours: (theirs,) if isinstance(theirs, str) else theirs for ours, theirs in table.items()}
    return {f"{ours}.{kind}": tuple(f"{t}.{kind}" for t in rows[ours]) for ours in rows for kind in ("weight", "bias")}


MIN_DALLE = Layout(
    ends={
        "text.weight": ("tok_emb_txt.weight",),
        "text_positions.weight": ("pos_emb_txt.weight",),
        "image.weight": ("tok_emb_img.weight",),
        "places.weight": ("pos_emb_img.weight",),
        **both({"norm": "ln_f"}),
        "text_head.weight": ("head_txt.weight",),
        "image_head.weight": ("head_img.weight",),
    },
    blocks="blocks.",
    block=both(
        {
            "norm1": "ln1",
            "qkv": ("attn.query", "attn.key", "attn.value"),
            "out": "attn.proj",
            "norm2": "ln2",
            "mlp.up": "mlp.0",
            "mlp.down": "mlp.2",
        }
    ),
    marks=("tok_emb_txt.weight", "pos_emb_txt.weight", "tok_emb_img.weight", "pos_emb_img.weight"),
    fixed={
        "attention": "full",
        "pads": False,
        "pad": 0,
        "positions": "flat",
        "norm": "pre",
        "activation": "gelu",
        "head_norm": False,
        "head_bias": False,
    },
    files="stage1_last.ckpt and stage2_last.ckpt of minDALL-E",
)
RU_DALLE = Layout(
    ends={
        "text.weight": ("text_embeddings.weight",),
        "text_positions.weight": ("text_pos_embeddings.weight",),
        "image.weight": ("image_embeddings.weight",),
        "rows.weight": ("image_row_embeddings.weight",),
        "columns.weight": ("image_col_embeddings.weight",),
        **both({"norm": "transformer.final_layernorm", "head_norm": "to_logits.0"}),
    },
    blocks="transformer.layers.",
    block=both(
        {
            "norm1": "input_layernorm",
            "qkv": "attention.query_key_value",
            "out": "attention.dense",
            "after1": "before_first_addition_layernorm",
            "norm2": "post_attention_layernorm",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
            "after2": "before_second_addition_layernorm",
        }
    ),
    marks=(
        "text_embeddings.weight",
        "text_pos_embeddings.weight",
        "image_embeddings.weight",
        "image_row_embeddings.weight",
    ),
    fixed={
        "attention": "sparse",
        "conv": "conv_clamped",
        "pads": True,
        "pad": 0,
        "positions": "axial",
        "norm": "sandwich",
        "activation": "gelu_tanh",
        "head_norm": True,
        "head_bias": True,
    },
    files="pytorch_model_v3.bin and vqgan.gumbelf8-sber.model.ckpt of ruDALL-E",
)


def to_ours(state: Mapping[str, Tensor], config: Mapping) -> tuple[State, dict[str, Any]]:
    """A state of either source (or ours), and what its files or its card say -> our state and config.

    Sizes come from shapes, and from `config` what shapes cannot tell: heads, the pictures' side, how captions are left
    out. Of ours, all comes from `config`. What is not known keeps its name, so that strict loading reports it.
    Raises WeightsMismatch for weights of another kind, without an image tokenizer, or whose config does not say enough.
    """
    said = {name: config[name] for name in OUR_FIELDS if name in config}
    if any(name.startswith((OUR_PICTURES, "transformer.blocks.")) for name in state):
        if "image" not in said or "transformer" not in said:
            raise WeightsMismatch("the sizes of this DALL-E are not known: its config.json must lie beside the weights")
        return dict(state), said
    pictures = {name.removeprefix(PICTURES): t for name, t in state.items() if name.startswith(PICTURES)}
    words = _unwrapped({name: tensor for name, tensor in state.items() if not name.startswith(PICTURES)})
    layout = next((x for x in (MIN_DALLE, RU_DALLE) if all(mark in words for mark in x.marks)), None)
    if layout is None:
        some = ", ".join(sorted(words)[:3]) or "none"
        raise WeightsMismatch(
            f"these {len(words)} tensors ({some}, ...) are not a DALL-E as minDALL-E or ruDALL-E published it, nor "
            f"zoo's own. Name the folder that holds {MIN_DALLE.files}, or {RU_DALLE.files}"
        )
    if not pictures:
        raise WeightsMismatch(f"this DALL-E lacks its image tokenizer: name the folder that holds {layout.files}")
    pictures, image = vqgan.to_ours(pictures, said.get("image", {}))
    transformer = _sizes(layout, words, said.get("transformer", {}))
    words = _renamed(layout, _prepared(words, transformer) if layout is RU_DALLE else words, transformer["depth"])
    state = words | {OUR_PICTURES + name: tensor for name, tensor in pictures.items()}
    return state, said | {"image": image, "transformer": transformer}


def _unwrapped(state: State) -> State:
    for wrapper in WRAPPERS:
        inner = {name.removeprefix(wrapper): t for name, t in state.items() if name.startswith(wrapper)}
        state = inner or state
    return state


def _sizes(layout: Layout, state: State, said: Mapping) -> dict[str, Any]:
    (text_rows, width), (text_places, _), (vocab, _), (places, _) = (state[mark].shape for mark in layout.marks)
    if "heads" not in said:
        raise WeightsMismatch(
            "nothing beside these weights says how many heads the transformer has, and shapes cannot tell: load them "
            "under the name of their own card"
        )
    text_length = text_places - 1 if layout is RU_DALLE else text_places  # the last place is of versions before v3
    pads = text_length if layout.fixed["pads"] else 0  # rows below those of the pieces
    numbers = (re.match(rf"{re.escape(layout.blocks)}(\d+)\.", name) for name in state)
    return {
        "text_vocab": text_rows - pads,
        "text_length": text_length,
        "vocab": vocab,
        "grid": math.isqrt(places) if layout.fixed["positions"] == "flat" else places,
        "width": width,
        "depth": max((int(number[1]) + 1 for number in numbers if number), default=0),
        "heads": said["heads"],
        **layout.fixed,
    }


def _prepared(state: State, sizes: Mapping) -> State:
    """ruDALL-E's state without what zoo computes or never uses, and its one output layer as two, under our names.

    Left out are the masks, the last row of the positions, and the outputs that predict paddings of one position each:
    here all padding is token 0. Raises WeightsMismatch for weights of before v3.
    """
    conv, text, grid = state.get(MASKS[-1]), sizes["text_length"], sizes["grid"]
    # In v2 columns are a ring, so that the last code of the first row sees the first one.
    if conv is not None and len(conv) >= text + grid and conv[text + grid - 1, text]:
        raise WeightsMismatch(
            "these are weights of ruDALL-E's second version (Emojich, Malevich v2), whose text begins one token later "
            "and whose masks are shifted by it: take pytorch_model_v3.bin"
        )
    state = {name: tensor for name, tensor in state.items() if name not in MASKS}
    state["text_pos_embeddings.weight"] = state["text_pos_embeddings.weight"][:text]
    for kind in ("weight", "bias"):
        if (both_heads := state.pop(f"to_logits.1.{kind}", None)) is not None:
            state[f"{OURS}text_head.{kind}"] = both_heads[: sizes["text_vocab"]]
            state[f"{OURS}image_head.{kind}"] = both_heads[sizes["text_vocab"] + text :]
    return state


def _renamed(layout: Layout, state: State, depth: int) -> State:
    left, ours = dict(state), {}
    for name, theirs in layout.pairs(depth):
        if all(their in left for their in theirs):
            parts = [left.pop(their) for their in theirs]
            ours[OURS + name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return ours | left
