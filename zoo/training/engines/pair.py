"""The engines of a generator and its discriminator as one, for a Run to save, restore and log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zoo import distributed
from zoo.errors import SettingsError, TrainingDiverged

from ..log import PATIENCE
from .base import Engine, Piece, Source

PREFIX = "discriminator."


class Pair:
    """See `Engine`. The generator is the model; of the state, the discriminator's names begin with "discriminator.".

    Both are of one type that holds the whole model on every rank. `note` sums up numbers for the log.
    """

    swaps = False

    def __init__(self, generator: Engine, discriminator: Engine):
        self.generator, self.discriminator = generator, discriminator
        self.model, self.device, self.optimizer = generator.model, generator.device, generator.optimizer
        self.trained, self.replicated = generator.trained, generator.replicated
        self.group_lrs = [*generator.group_lrs, *discriminator.group_lrs]
        self.refresh, self.evaluate = generator.refresh, generator.evaluate
        self.forward, self.backward = generator.forward, generator.backward
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.lost = torch.zeros((), device=self.device)  # the discriminator's updates left out, in a row
        if clash := [name for name in generator.model.state_dict() if name.startswith(PREFIX)]:
            raise SettingsError(f"{clash[0]}: no part of the model may be called discriminator here: rename it")

    @property
    def grad_norm(self) -> Tensor | None:
        return self.generator.grad_norm

    @property
    def due(self) -> bool:
        return self.generator.due

    def discriminate(self, target: Tensor, image: Tensor, learns: Callable[[Tensor], bool]) -> None:
        """A micro-batch of the discriminator's: real and drawn pictures (B, 3, H, W). `learns(its loss, the mean of all
        ranks)`: whether it does from these."""
        found = self.discriminator.forward({"target": target.detach(), "image": image.detach()})
        learning = learns(distributed.average(found["loss"].detach()))
        noted = found | {"rests": found["loss"].new_tensor(float(not learning))}
        self.note({f"{PREFIX[:-1]}_{name}": value for name, value in noted.items()})
        if learning:
            self.discriminator.backward(found["loss"])

    def step(self, lrs: Sequence[float]) -> bool:
        count = len(self.generator.group_lrs)
        if self.discriminator.due:
            self.discriminator.step(lrs[count:])
            self.lost = (self.lost + 1) * (~torch.isfinite(self.discriminator.grad_norm)).float()
        return self.generator.step(lrs[:count])

    def note(self, numbers: Mapping[str, Tensor]) -> None:
        """Adds to the means that the log gets: the same on every rank, so that a checkpoint of one is that of all."""
        values = distributed.average(torch.stack([value.detach().float() for value in numbers.values()]))
        for name, value in zip(numbers, values, strict=True):
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def figures(self) -> dict[str, float]:
        if self.lost >= PATIENCE:
            raise TrainingDiverged(
                f"{self.lost:.0f} updates of the discriminator in a row were left out, for its gradient was not "
                "finite: lower the rate, let it begin later, or use precision='fp32'; the checkpoints are of before"
            )
        found = {name: float(value) / self.counts[name] for name, value in self.sums.items()}
        self.sums, self.counts = {}, {}
        return self.generator.figures() | found

    def layer_norms(self) -> dict[str, float]:
        theirs = self.discriminator.layer_norms() if self.discriminator.due else {}
        return self.generator.layer_norms() | {PREFIX + name: norm for name, norm in theirs.items()}

    # --- state -------------------------------------------------------------------------------------------------------
    def pieces(self) -> dict[str, dict[str, Piece]]:
        found = self.generator.pieces()
        for kind, named in self.discriminator.pieces().items():
            found.setdefault(kind, {}).update({PREFIX + name: piece for name, piece in named.items()})
        return found

    def extra(self) -> dict[str, Any]:
        found, theirs = self.generator.extra(), self.discriminator.extra()
        found["numbers"] |= {PREFIX + name: held for name, held in theirs.pop("numbers").items()}
        noted = {name: (float(value), self.counts[name]) for name, value in self.sums.items()}
        return found | {"discriminator": theirs, "noted": noted, "lost": float(self.lost)}

    def restore(self, source: Source) -> None:
        self.generator.restore(_Part(source, ""))
        self.discriminator.restore(_Part(source, PREFIX))
        state = source.engine
        self.sums = {name: torch.tensor(value, device=self.device) for name, (value, _) in state["noted"].items()}
        self.counts = {name: count for name, (_, count) in state["noted"].items()}
        self.lost.fill_(state["lost"])


class _Part:
    """What a checkpoint of a pair holds of one of them. See `Source`."""

    def __init__(self, source: Source, prefix: str):
        self.source, self.prefix = source, prefix
        state = source.engine.get("discriminator", {}) if prefix else source.engine
        self.engine = state | {"numbers": self._own(source.engine["numbers"])}
        self.optimizer_kinds = {kind for kind in source.optimizer_kinds if self.names(kind)}

    def __str__(self) -> str:
        return str(self.source)

    def _own(self, numbers: Mapping[str, Any]) -> dict[str, Any]:
        mine = {name: held for name, held in numbers.items() if name.startswith(PREFIX) == bool(self.prefix)}
        return {name.removeprefix(self.prefix): held for name, held in mine.items()}

    def names(self, kind: str) -> set[str]:
        return set(self._own(dict.fromkeys(self.source.names(kind))))

    def fill(self, kind: str, name: str, piece: Piece) -> None:
        self.source.fill(kind, self.prefix + name, piece)
