"""Published weights of VQGAN -> ours. A state maps names to tensors; our config is what VqganConfig takes.

Four layouts:
    CompVis/taming-transformers   state_dict.encoder.down.0.block.0.conv1.weight and so on, with the discriminator and
                                  LPIPS below loss.; minDALL-E's stage 1 and ruDALL-E's Gumbel VQGAN are stored so too
    ai-forever/ru-dalle, dwt      the same below model., whose decoder holds a decoder, its own post_quant_conv and the
                                  filters of the wavelet; the outer post_quant_conv is never used there
    kuprel/min-dalle              detoker.pt: embedding.weight, post_quant_conv, decoder
    patil-suraj/vqgan-jax         DALL-E mini's, flax: encoder/down_0/block_0/conv1/kernel, its axes in flax's order

Ours are taming's names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoo.errors import WeightsMismatch

State = dict[str, Tensor]

SIZE = 256  # pixels; shapes cannot tell it, since the network takes any size
WRAPPERS = ("state_dict.", "module.", "model.", "params/")
UNUSED = ("loss.", "decoder.idwt.")
FLAX = (  # in order
    (re.compile(r"/"), "."),
    (re.compile(r"\.(kernel|scale|embedding)$"), ".weight"),
    (re.compile(r"\b(down|up)_(\d+)\."), r"\1.\2."),
    (re.compile(r"(?<!\bmid\.)\b(block|attn)_(\d+)\."), r"\1.\2."),
)
BOOKS = {"quantize.embedding.weight": "vq", "quantize.embed.weight": "gumbel"}
MARKS = ("decoder.conv_in.weight", "decoder.conv_out.weight", "decoder.up.0.block.0.conv1.weight")


def to_ours(state: Mapping[str, Tensor], config: Mapping) -> tuple[State, dict[str, Any]]:
    """A state of any of these layouts (or ours), and what its files or its card say -> our state and config.

    Sizes come from shapes; `config` only says the pictures' side, as `size`, or as `resolution` in DALL-E mini's
    config.json, and `black`, which is 0 in DALL-E mini's and min-dalle's files and else -1, unless it says otherwise.
    What is not known keeps its name, so that strict loading reports it.
    Raises WeightsMismatch for weights of another kind.
    """
    state = _unwrapped(state)
    # DALL-E mini gave its VQGAN pixels of 0..1 (tools/dataset/encode_dataset.ipynb), though it was trained on -1..1.
    black = 0.0 if "embedding.weight" in state or any("/" in name for name in state) else -1.0
    state = _renamed(state)
    books = [name for name in BOOKS if name in state]
    if len(books) != 1 or "post_quant_conv.weight" not in state or any(name not in state for name in MARKS):
        some = ", ".join(sorted(state)[:3]) or "none"
        raise WeightsMismatch(
            f"these {len(state)} tensors ({some}, ...) are not a VQGAN as taming-transformers, minDALL-E, ruDALL-E, "
            "DALL-E mini or min-dalle published it, nor zoo's own. Check that the file is of the model that was asked "
            "for, and that it holds the image tokenizer and not the transformer"
        )
    return state, _config(state, books[0], {"black": black, **config})


def _unwrapped(state: Mapping[str, Tensor]) -> State:
    for wrapper in WRAPPERS:
        inner = {name.removeprefix(wrapper): t for name, t in state.items() if name.startswith(wrapper)}
        state = inner or state
    return dict(state)


def _renamed(state: State) -> State:
    if any("/" in name for name in state):
        state = {_spelled(name): _from_flax(name, tensor) for name, tensor in state.items()}
    if any(name.startswith("decoder.decoder.") for name in state):
        state = {name: tensor for name, tensor in state.items() if not name.startswith("post_quant_conv.")}
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^decoder\.(decoder|post_quant_conv)\.", r"\1.", name)
        name = "quantize.embedding.weight" if name == "embedding.weight" else name
        if not name.startswith(UNUSED):
            renamed[name] = tensor
    return renamed


def _spelled(name: str) -> str:
    for pattern, ours in FLAX:
        name = pattern.sub(ours, name)
    return name


def _from_flax(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("/kernel") and tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1).contiguous()  # height, width, in, out -> out, in, height, width
    return tensor if name.endswith("/embedding") else tensor.flatten()  # of norms, (1, 1, 1, C) before flax 0.3.6


def _config(state: State, book: str, config: Mapping) -> dict[str, Any]:
    levels = _count(state, r"decoder\.up\.(\d+)\.")
    firsts = [state.get(f"decoder.up.{level}.block.0.conv1.weight") for level in range(levels)]
    if any(first is None for first in firsts):
        raise WeightsMismatch("the decoder of this VQGAN lacks a level; fetch the file again")
    vocab, code_width = state[book].shape
    return {
        "size": config.get("resolution", config.get("size", SIZE)),
        "widths": tuple(first.shape[0] for first in firsts),
        "blocks": _count(state, r"decoder\.up\.0\.block\.(\d+)\.") - 1,
        "attention": tuple(level for level in range(levels) if f"decoder.up.{level}.attn.0.norm.weight" in state),
        "latent": state["post_quant_conv.weight"].shape[0],
        "vocab": vocab,
        "code_width": code_width,
        "quantizer": BOOKS[book],
        "black": config["black"],
        "encoder": any(name.startswith("encoder.") for name in state),
        "haar": state["decoder.conv_out.weight"].shape[0] == 12,
    }


def _count(state: State, pattern: str) -> int:
    """One more than the largest number that the names hold at the pattern's place."""
    return max((int(found[1]) + 1 for name in state if (found := re.match(pattern, name))), default=0)
