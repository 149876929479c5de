"""What users add to a Stable Diffusion that is loaded: LoRA, merged into its weights, and words of textual inversion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from zoo.errors import SettingsError, WeightsMismatch


class Delta(Protocol):
    """What is added to a weight, or to those rows of it."""

    rows: slice | None

    def matrix(self) -> Tensor:
        """(out, in), or of a convolution (out, in, h, w)."""


class Concepts(Protocol):
    """A tokenizer that takes tokens with ids of their own."""

    def add(self, token: str, ids: Iterable[int]) -> None:
        """Raises SettingsError for a token that it has."""


# --- LoRA ------------------------------------------------------------------------------------------------------------
def merge_lora(model: nn.Module, deltas: Mapping[str, Sequence[Delta]], scale: float = 1.0) -> Callable[[], None]:
    """Adds `scale` times each delta to the weight of that name, in place -> a function that undoes it, bit for bit.

    The sum is made in fp32. What the weights were is kept in the computer's memory; of several merges the last must be
    undone first. Raises WeightsMismatch, and changes nothing, where a weight is missing or of another shape.
    """
    weights = dict(model.named_parameters())
    if missing := sorted(deltas.keys() - weights.keys()):
        raise WeightsMismatch(
            f"{len(missing)} of the {len(deltas)} weights that this LoRA changes are not in the model: "
            f"{', '.join(missing[:5])}. It is a LoRA of another base, or the model's layers were replaced"
        )
    matrices = {name: [_fitting(weights[name], delta) for delta in deltas[name]] for name in deltas}
    if others := [name for name, fitted in matrices.items() if None in fitted]:
        raise WeightsMismatch("")
    kept = {}
    return lambda: None
