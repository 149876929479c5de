"""The row that describes a published model. Rows hold references, no logic: nothing is imported until it is called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.hub import File

if TYPE_CHECKING:
    from torch import Tensor, nn

Config = Mapping[str, Any]
Convert = Callable[["Mapping[str, Tensor]", Config], tuple["dict[str, Tensor]", dict[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Card:
    """A published model: where it is, what it is, and the functions that make it usable.

    `files`: the weights first, then those of the tokenizer. `alternatives`: the same weights in another file, tried
    when the first cannot be had. `parts`: where the weights are several files that are read as one, the name of each
    and what to put before the names of its tensors, in the order of `files`; a local folder that holds them all is read
    the same way. `config_file`: what the publisher says of the weights, where it is worth asking.
    `config`: our sizes as a plain dict; None where the weights' own files say them. What no source states is left out
    of it, and the published config decides. `params` counts them; None for a family of no fixed size.
    `convert(state, published config)` gives our state and config; `tokenizer(config, files by name)` may be None.
    `figures`: accuracies that the source reports, in percent. `trained`: how, of a model that zoo's own scripts made.
    """

    name: str
    task: str
    family: str
    files: tuple[File, ...] = ()
    alternatives: tuple[File, ...] = ()
    parts: Mapping[str, str] = field(default_factory=dict)
    config_file: File | None = None
    config: Config | None = None
    build: Callable[[Config], nn.Module]
    convert: Convert
    tokenizer: Callable[[Config, Mapping[str, Path]], Any] | None = None
    transform: Callable[[Config], Callable] | None = None
    params: int | None = None
    dtype: str = "float32"
    licence: str
    commercial: bool = True  # False: research or other non-commercial use only
    languages: tuple[str, ...] = ("en",)
    source: str
    trained: str = ""
    figures: Mapping[str, float] = field(default_factory=dict)
