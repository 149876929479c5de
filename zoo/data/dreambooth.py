"""A few pictures of one thing, and others of its kind beside them, so that the kind is not forgotten (DreamBooth, Ruiz
et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .pairs import Sample, collate_fn


class Captioned(Dataset):
    """Pictures that all have one caption."""

    def __init__(self, pictures: Dataset, text: Any):
        self.pictures, self.text = pictures, text

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> Sample:
        return self.pictures[i][0], self.text


class DreamBooth(Dataset):
    """Samples of one thing, `instance`, each with one of `prior`; the shorter of the two is begun again."""

    def __init__(self, instance: Dataset, prior: Dataset):
        self.instance, self.prior = instance, prior

    def __len__(self) -> int:
        return max(len(self.instance), len(self.prior))

    def __getitem__(self, i: int) -> tuple[Sample, Sample]:
        return self.instance[i % len(self.instance)], self.prior[i % len(self.prior)]


def dreambooth_collate(prior_weight: float, batch: Sequence[tuple[Sample, Sample]]) -> dict[str, Tensor]:
    """B such samples -> {"image", "text", "weight"} of 2 B, of the thing first. The weights make of a mean over all the
    sum of that over the thing and `prior_weight` times that over the prior, as in the paper's equation 2."""
    things, priors = zip(*batch, strict=True)
    weight = torch.tensor([2.0, 2.0 * prior_weight]).repeat_interleave(len(batch))
    return collate_fn([*things, *priors]) | {"weight": weight}
