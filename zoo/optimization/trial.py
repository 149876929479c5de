"""`optimize`: each replacement of the table is tried on the model, and kept if it is equal and faster."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

from torch import Tensor, nn

from zoo.errors import SettingsError
from zoo.optimization.advice import advice_for
from zoo.optimization.measure import Measure
from zoo.optimization.replacements import REPLACEMENTS, Found, Replacement
from zoo.optimization.report import Report, Row

FASTER = 1.02  # smaller gains drown in the noise of a machine


def optimize(
    model: nn.Module,
    batch: Mapping[str, object] | list | tuple | Tensor | None = None,
    *,
    compile: bool | None = False,
    channels_last: bool | None = None,
) -> Report:
    """Replaces parts of the model by faster equals, in place, and reports each; `report.undo()` takes all back.

    Modules, parameters and state keys stay what they are, so an optimizer made before goes on training the model. With
    an example batch (what the model is called with: keywords, positions or one tensor) outputs and gradients must agree
    to 1e-5 in float32, gradients that rounding alone moves further in float64, and the time of a forward pass, in
    training mode with its backward pass, must fall; without one, only what is equal by construction is replaced.
    `compile` and `channels_last`: False never, None if faster, True unless it differs. Call it before the model is
    wrapped, by DDP or others. Attention weights that are asked for by `need_weights=True` are given as before;
    transformers' `output_attentions=True` needs `undo()` first.
    """
    if not isinstance(model, nn.Module):
        raise SettingsError(f"optimize takes an nn.Module, not a {type(model).__name__}: pass the model itself")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise SettingsError(
            "DDP watches the forward passes that optimize would measure: pass the model before DDP wraps it"
        )
    options = {"compile": compile, "channels_last": channels_last}
    measure = None if batch is None else Measure(model, batch)
    rows = []
    with ExitStack() as undo:  # an error on the way takes back what was made
        for replacement in REPLACEMENTS:
            asked = options.get(replacement.option)
            found = None if asked is False else replacement.find(model, measure and measure.probe)
            if found:
                row = _judge(replacement, found, measure, bool(asked))
                if row.kept:
                    undo.callback(found.make())
                rows.append(row)
        return Report(tuple(rows), advice_for(model), undo.pop_all())


def _judge(replacement: Replacement, found: Found, measure: Measure | None, asked: bool) -> Row:
    """Tries a replacement and takes it back."""
    name, where = replacement.name, found.where
    if measure is None:
        if replacement.sure or asked:
            return Row(name, where, None, True, "not measured")
        return Row(name, where, None, False, "not measured, give a batch")
    try:
        distance = measure.distance(found.make)
        if not distance <= measure.tolerance:
            return Row(name, where, None, False, f"differs by {distance:.0e}")
        gain = measure.gain(found.make)
    except Exception as error:  # whatever a foreign model raises under a replacement means: not this one
        reason = (str(error).strip().splitlines() or [""])[0]
        return Row(name, where, None, False, f"fails, {type(error).__name__}: {reason}")
    if gain >= FASTER:
        return Row(name, where, gain, True)
    return Row(name, where, gain, asked, "not faster, but asked for" if asked else "not faster")
