"""What users add to a Stable Diffusion that is loaded: LoRA, merged into its weights, and words of textual inversion.

n the vectors of a word, D width of the text tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from zoo.errors import SettingsError, WeightsMismatch

# The one tensor of a file of textual inversion that does not name its token: the web UI's .pt, and its safetensors.
_NAMELESS = ("string_to_param.*", "emb_params")


class Delta(Protocol):
    """What is added to a weight, or to those rows of it."""

    rows: slice | None

    @property
    def shape(self) -> torch.Size:
        """Of the matrix."""

    def matrix(self) -> Tensor:
        """(out, in), or of a convolution (out, in, h, w)."""


class Concepts(Protocol):
    """A tokenizer that takes tokens with ids of their own."""

    def add(self, token: str, ids: Iterable[int]) -> None:
        """Raises SettingsError for a token that it has already."""


# --- LoRA ------------------------------------------------------------------------------------------------------------
def merge_lora(model: nn.Module, deltas: Mapping[str, Sequence[Delta]], scale: float = 1.0) -> Callable[[], None]:
    """Adds `scale` times each delta to the weight of that name, in place -> a function that undoes it, bit for bit.

    Sums are made in fp32. What the weights were is kept in the computer's memory; of several merges the last must be
    undone first. Raises WeightsMismatch, and changes nothing, where a weight is missing or of another shape.
    """
    weights = dict(model.named_parameters())
    if missing := sorted(deltas.keys() - weights.keys()):
        raise WeightsMismatch(
            f"{len(missing)} of the {len(deltas)} weights that this LoRA changes are not in the model: "
            f"{', '.join(missing[:5])}. It is a LoRA of another base, or these layers were replaced by others"
        )
    pairs = [(name, _rows(weights[name], delta), delta) for name, parts in deltas.items() for delta in parts]
    if others := [pair for pair in pairs if not _fits(pair[1].shape, pair[2].shape)]:
        shown = (f"{name} {tuple(there.shape)} by {tuple(delta.shape)}" for name, there, delta in others[:3])
        raise WeightsMismatch(
            f"this is a LoRA of another base: it changes {'; '.join(shown)}, and {len(others)} of {len(pairs)} in all "
            "do not fit. Load the model that it was trained for"
        )
    kept = {name: weights[name].detach().to("cpu", copy=True) for name in deltas}
    with torch.no_grad():
        for _, there, delta in pairs:
            change = delta.matrix().to(there.device).reshape(there.shape)
            there.copy_(there.float() + scale * change)

    def undo() -> None:
        with torch.no_grad():
            for name, weight in kept.items():
                weights[name].copy_(weight)

    return undo


def _rows(weight: nn.Parameter, delta: Delta) -> Tensor:
    """The part of a weight that a delta changes, a view."""
    return weight.detach() if delta.rows is None else weight.detach()[delta.rows]


def _fits(there: torch.Size, change: torch.Size) -> bool:
    """A 1x1 convolution is a linear layer in another layout."""
    return there[:2] == change[:2] and there.numel() == change.numel()


# --- textual inversion -----------------------------------------------------------------------------------------------
def read_concept(state: Mapping[str, Tensor], name: str | None = None) -> tuple[str, Tensor]:
    """A file of textual inversion -> the token that stands for it in prompts, and its vectors (n, D).

    `name`: the token, in place of the file's own; the web UI's files have none, and are called what their file is.
    Raises WeightsMismatch for files of another kind, SettingsError where a token is not named.
    """
    found = {key: tensor for key, tensor in state.items() if key in _NAMELESS} or dict(state)
    (key, vectors), *more = found.items() if found else [("", torch.empty(0))]
    if more or vectors.dim() not in (1, 2) or not vectors.numel():
        shapes = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in list(found.items())[:4]) or "nothing"
        raise WeightsMismatch(f"this is not one word of textual inversion for one text tower, it holds {shapes}")
    if name is None and key in _NAMELESS:
        raise SettingsError("this file of textual inversion does not name its token: give name=, its file's by custom")
    return name or key, vectors.detach().reshape(-1, vectors.shape[-1])


def add_concept(text: nn.Module, tokenizer: Concepts, token: str, vectors: Tensor) -> None:
    """Gives a token its vectors (n, D): n new rows of the text tower's `embed`, which the tokenizer gives the ids of.

    Raises WeightsMismatch for vectors of another width, and SettingsError for a token that there is already. The
    model's config is left as it was: keep the concept's own file, and add it again to a model that is loaded again.
    """
    embed: nn.Embedding = text.embed
    count, width = embed.weight.shape
    if vectors.dim() != 2 or vectors.shape[1] != width:
        raise WeightsMismatch(
            f"the vectors of {token!r} are {tuple(vectors.shape)} and this text tower's are {width} wide: it is "
            "textual inversion of another base; load the model that it was trained for"
        )
    tokenizer.add(token, range(count, count + len(vectors)))
    rows = torch.cat([embed.weight.detach(), vectors.to(embed.weight)])
    text.embed = nn.Embedding.from_pretrained(rows, freeze=not embed.weight.requires_grad)
