"""Whether what a checkpoint holds is of this model and of what it trains; the same words from every engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from zoo.errors import SettingsError, WeightsMismatch

from .base import WEIGHTS, Source

_NAMED = 4  # how many names an error lists
_HOW = ("params", "fused", "foreach", "capturable", "differentiable")


def check_weights(source: Source, mine: Iterable[str]) -> None:
    """Raises WeightsMismatch if the source holds other tensors than `mine`."""
    mine, theirs = set(mine), source.names(WEIGHTS)
    if mine != theirs:
        raise WeightsMismatch(
            f"{source} is of another model{_listed('without', mine - theirs)}{_listed('with', theirs - mine)}"
            ": choose a new run_folder"
        )


def check_optimizer(source: Source, trained: Iterable[str]) -> None:
    """Raises SettingsError if the source's optimizer had other parameters than `trained`."""
    trained = set(trained)
    for kind in source.optimizer_kinds:
        theirs = source.names(kind)
        if theirs != trained:
            raise SettingsError(
                f"{source} trained other parameters{_listed('not', trained - theirs)}{_listed('but', theirs - trained)}"
                ": freeze and unfreeze as before, or choose a new run_folder"
            )


def update_groups(groups: list[dict[str, Any]], saved: list[dict[str, Any]]) -> None:
    """Takes over what the saved groups say, where the same optimizer has that word; how it is computed stays."""
    if len(groups) == len(saved):
        for group, before in zip(groups, saved, strict=True):
            group.update({k: v for k, v in before.items() if k in group and k not in _HOW})


def _listed(what: str, names: set[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f", {what} {', '.join(sorted(names)[:_NAMED])}{more}"
