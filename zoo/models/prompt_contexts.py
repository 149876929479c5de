"""Prompts -> what a UNet is told of them: windows of tokens through the text tower, one after the other.

B prompts, T tokens of all windows, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zoo.errors import SettingsError
from zoo.generation.prompts import weigh, weighted, windows

if TYPE_CHECKING:
    from zoo.models.stable_diffusion import StableDiffusion

Window = list[tuple[int, float]]


class PromptReader:
    """Reads prompts for a model that has a tokenizer; each text once. Raises SettingsError where it has none."""

    def __init__(self, model: StableDiffusion, skip: int = 0):
        if model.tokenizer is None:
            raise SettingsError(
                "generate needs the model's tokenizer: StableDiffusion(..., tokenizer=), or load it by AutoLoader"
            )
        self.model, self.skip = model, skip
        self.known: dict[tuple[str, int], Tensor] = {}

    def groups(self, texts: list[str], negative: str | None) -> Iterator[tuple[list[int], Tensor, Tensor | None]]:
        """(rows, their contexts (B, T, D), those of the negative prompt) for each number of windows that there is, so
        that what a prompt becomes does not depend on those beside it."""
        beside = [] if negative is None else self.windows(negative)
        read = {text: self.windows(text) for text in dict.fromkeys(texts)}
        counts = [max(len(read[text]), len(beside)) for text in texts]
        for count in dict.fromkeys(counts):
            rows = [row for row, other in enumerate(counts) if other == count]
            contexts = torch.cat([self.context(texts[row], read[texts[row]], count) for row in rows])
            without = None if negative is None else self.context(negative, beside, count).expand_as(contexts)
            yield rows, contexts, without

    def windows(self, text: str) -> list[Window]:
        """A prompt -> its windows, each of (id, weight) without start and end; one at least."""
        room = self.model.config.window - 2
        return windows(weighted(text), self.model.tokenizer.encode, room) or [[]]

    def context(self, text: str, parts: list[Window], count: int) -> Tensor:
        """Windows, filled up to `count` of them with empty ones -> (1, T, D)."""
        if (text, count) not in self.known:
            config, tower = self.model.config, self.model.text
            ids, weights = [], []
            for part in parts + [[]] * (count - len(parts)):
                blank = config.window - 2 - len(part)
                ids.append([config.start, *(id for id, _ in part), config.end] + [config.pad] * blank)
                weights.append([1.0, *(weight for _, weight in part), 1.0] + [1.0] * blank)
            device = next(tower.parameters()).device
            context = tower(torch.tensor(ids, device=device), self.skip)  # (windows, T, D)
            context = weigh(context, torch.tensor(weights, device=device))
            self.known[text, count] = context.flatten(0, 1)[None]
        return self.known[text, count]
