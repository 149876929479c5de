"""Published weights of CLIP-GEN -> ours. A state maps names to tensors; our config is what ClipGenConfig takes.

HFAiLab/clip-gen's release v0.1.0 is three files, which are read as one:
    clip_vit_b32.pt    OpenAI's CLIP; its tensors are called clip.* here
    vqgan_coco.pt      model.encoder.down.0.block.2.weight and so on; called vqgan.* here
    gpt_coco.pt        model.blocks.0.encoder.self_attn.in_proj_weight and so on, or the same without model.; each block
                       is torch's TransformerEncoderLayer, and holds the causal mask too

Ours are the three parts of a ClipGen: clip.*, vqgan.* and transformer.*.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from zoo.converters import clip, vqgan
from zoo.errors import WeightsMismatch

State = dict[str, Tensor]

CLIP, VQGAN, OURS = "clip.", "vqgan.", "transformer."
FILES = "clip_vit_b32.pt, vqgan_coco.pt and gpt_coco.pt of clip-gen"
WRAPPERS = ("model.", "module.")
OUR_FIELDS = (
    *("clip", "image", "transformer"),
    *("condition_dropout", "noise", "code_dropout", "embedding_weight", "guidance"),
)
MARKS = ("cond_proj.weight", "tok_emb.weight", "pos_emb")
# torch's joint matrix holds queries, keys and values one below the other, as ours does.
MODULES = {"cond_proj": "context", "tok_emb": "image", "norm": "norm", "head": "image_head"}
LAYERS = {
    "self_attn.out_proj": "out",
    "linear1": "mlp.up",
    "linear2": "mlp.down",
    "norm1": "norm1",
    "norm2": "norm2",
}
MASK = re.compile(r"blocks\.\d+\.mask")
HEAD_WIDTH = 64  # of both sizes in models/gpt.py; shapes cannot tell it
QUICK = {tower: {"activation": "quick_gelu"} for tower in ("image", "text")}  # of the release's CLIP


def to_ours(state: Mapping[str, Tensor], config: Mapping) -> tuple[State, dict[str, Any]]:
    """The release's three files as one (or ours), and what its files or its card say -> our state and config.

    Sizes come from shapes, and from `config` what shapes cannot tell: heads, unless they are of 64, dropout, and what
    the converters of CLIP and VQGAN ask for. Of ours, all comes from `config`. What is not known keeps its name, so
    that strict loading reports it. Raises WeightsMismatch for weights of another kind, or without one of the parts.
    """
    said = {name: config[name] for name in OUR_FIELDS if name in config}
    if any(name.startswith(f"{OURS}blocks.") for name in state):
        if not {"clip", "image", "transformer"} <= said.keys():
            raise WeightsMismatch(
                "the sizes of this CLIP-GEN are not known: its config.json must lie beside the weights"
            )
        return dict(state), said
    words, pictures = _below(state, CLIP), _below(state, VQGAN)
    rest = {name: tensor for name, tensor in state.items() if not name.startswith((CLIP, VQGAN))}
    for wrapper in WRAPPERS:
        rest = _below(rest, wrapper) or rest
    if any(mark not in rest for mark in MARKS):
        some = ", ".join(sorted(rest)[:3]) or "none"
        raise WeightsMismatch(
            f"these {len(rest)} tensors ({some}, ...) are not a CLIP-GEN's transformer as HFAiLab published it, nor "
            f"zoo's own CLIP-GEN. Name the folder that holds {FILES}"
        )
    for part, name in ((words, "CLIP"), (pictures, "VQGAN")):
        if not part:
            raise WeightsMismatch(f"this CLIP-GEN lacks its {name}: name the folder that holds {FILES}")
    words, clip_sizes = clip.to_ours(words, said.get("clip", QUICK))
    pictures, image_sizes = vqgan.to_ours(pictures, said.get("image", {}))
    sizes = _sizes(rest, said.get("transformer", {}))
    found = {CLIP + name: tensor for name, tensor in words.items()}
    found |= {VQGAN + name: tensor for name, tensor in pictures.items()}
    found |= _renamed(rest, sizes["depth"])
    return found, said | {"clip": clip_sizes, "image": image_sizes, "transformer": sizes}


def _below(state: Mapping[str, Tensor], prefix: str) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _sizes(state: State, said: Mapping) -> dict[str, Any]:
    (vocab, width), embed = state["tok_emb.weight"].shape, state["cond_proj.weight"].shape[1]
    if "heads" not in said and width % HEAD_WIDTH:
        raise WeightsMismatch(
            f"nothing beside these weights says how many heads a transformer of width {width} has, and shapes cannot "
            "tell: load them under the name of their own card"
        )
    numbers = (re.match(r"blocks\.(\d+)\.", name) for name in state)
    return {
        "embed": embed,
        "vocab": vocab,
        "grid": math.isqrt(state["pos_emb"].shape[-2]),
        "width": width,
        "depth": max((int(number[1]) + 1 for number in numbers if number), default=0),
        "heads": said.get("heads", width // HEAD_WIDTH),
        "dropout": said.get("dropout", 0.0),
    }


def _renamed(state: State, depth: int) -> State:
    left = {name: tensor for name, tensor in state.items() if not MASK.fullmatch(name)}
    left["pos_emb"] = left["pos_emb"].flatten(0, -2)  # (1, N, D) -> (N, D)
    ours = {OURS + our: left.pop(their) for their, our in _names(depth) if their in left}
    return ours | left


def _names(depth: int) -> Iterator[tuple[str, str]]:
    """Their names with ours, of all tensors."""
    yield "pos_emb", "positions.weight"
    for kind in ("weight", "bias"):
        yield from ((f"{their}.{kind}", f"{our}.{kind}") for their, our in MODULES.items())
        for number in range(depth):
            yield f"blocks.{number}.encoder.self_attn.in_proj_{kind}", f"blocks.{number}.qkv.{kind}"
            for their, our in LAYERS.items():
                yield f"blocks.{number}.encoder.{their}.{kind}", f"blocks.{number}.{our}.{kind}"
