"""Published weights of DALL-E's dVAE -> ours. A state maps names to tensors; our config is what DvaeConfig takes.

Two sources:
    openai/DALL-E                  encoder.pkl, decoder.pkl, whole pickled modules: blocks.group_1.block_1.(...).w
    facebook/flava-image-codebook  the same encoder for transformers: blocks.group_1.group.block_1.(...).weight

Ours are OpenAI's names, below `encoder.` and `decoder.`, with weight and bias for w and b.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoo.errors import WeightsMismatch

State = dict[str, Tensor]

SIZE = 256  # pixels; shapes cannot tell it, since the network takes any size
WRAPPERS = ("state_dict.", "module.", "image_codebook.")  # the last one in a whole FLAVA
SPELLINGS = (  # in order
    (re.compile(r"(^|\.)(group_\d+)\.group\."), r"\1\2."),
    (re.compile(r"\.res_path\.path\."), ".res_path."),
    (re.compile(r"\.w$"), ".weight"),
    (re.compile(r"\.b$"), ".bias"),
)
FIRST, LAST = "blocks.input.weight", "blocks.output.conv.weight"


def to_ours(state: Mapping[str, Tensor], config: Mapping) -> tuple[State, dict[str, Any]]:
    """A state of either source (or ours), and what its files or its card say -> our state and config.

    A part without a prefix, as one file of a source holds it, is put below `encoder.` or `decoder.` by its shapes.
    Sizes come from shapes; `config` only says the pictures' side, as `size`, or as `codebook_size` in FLAVA's
    preprocessor_config.json. What is not known keeps its name, so that strict loading reports it.
    Raises WeightsMismatch for weights of another kind, and for a decoder without its encoder.
    """
    state = _prefixed({_renamed(name): tensor for name, tensor in _unwrapped(state).items()})
    if any(f"encoder.{name}" not in state or state[f"encoder.{name}"].ndim != 4 for name in (FIRST, LAST)):
        if f"decoder.{FIRST}" in state:
            raise WeightsMismatch(
                "this is the decoder of a dVAE alone: put the encoder's file, as encoder.pkl, beside decoder.pkl and "
                "name their folder"
            )
        some = ", ".join(sorted(state)[:3]) or "none"
        raise WeightsMismatch(
            f"these {len(state)} tensors ({some}, ...) are not a dVAE as OpenAI or FLAVA published it, nor zoo's own. "
            "Check that the file is of the model that was asked for"
        )
    return state, _config(state, config)


def _unwrapped(state: Mapping[str, Tensor]) -> State:
    for wrapper in WRAPPERS:
        inner = {name.removeprefix(wrapper): t for name, t in state.items() if name.startswith(wrapper)}
        state = inner or state
    return dict(state)


def _renamed(name: str) -> str:
    for spelling, ours in SPELLINGS:
        name = spelling.sub(ours, name)
    return name


def _prefixed(state: State) -> State:
    """Bare names below encoder. where the first convolution looks at pixels, 7 wide, and below decoder. otherwise."""
    if FIRST not in state:
        return state
    part = "encoder" if state[FIRST].ndim == 4 and state[FIRST].shape[-1] == 7 else "decoder"
    return {f"{part}.{name}": tensor for name, tensor in state.items()}


def _config(state: State, config: Mapping) -> dict[str, Any]:
    first, last = state[f"encoder.{FIRST}"], state[f"encoder.{LAST}"]
    code_book = state.get(f"decoder.{FIRST}")
    size = config.get("codebook_size", config.get("size", SIZE))
    sizes = {
        "size": size["height"] if isinstance(size, Mapping) else size,
        "vocab": last.shape[0],
        "hidden": first.shape[0],
        "groups": _count(state, r"encoder\.blocks\.group_(\d+)\."),
        "blocks": _count(state, r"encoder\.blocks\.group_1\.block_(\d+)\."),
        "decoder": code_book is not None,
    }
    return sizes if code_book is None else sizes | {"stem": code_book.shape[0]}


def _count(state: State, pattern: str) -> int:
    """The largest number that the names hold at the pattern's place."""
    return max((int(found[1]) for name in state if (found := re.match(pattern, name))), default=0)
