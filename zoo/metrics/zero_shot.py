"""Classification by captions (Radford et al. 2021, section 3.1). N pictures, C classes, P prompts, E embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import DataError, EmptyDataset, SettingsError

PROMPTS = (
    "{}",
    "a picture of {}",
    "a photo of a {}",
    "a drawing of a {}",
    "an icon of {}",
    "a small picture of the {}",
)


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Shares of pictures, 0 to 1. `mean_per_class`: each class counts alike, whatever its size. `chance`: one over the
    number of classes. `largest_class`: what always answering the commonest class would score."""

    top1: float
    top5: float
    mean_per_class: float
    chance: float
    largest_class: float
    pictures: int
    classes: int


def class_weights(
    names: Sequence[str], encode: Callable[[list[str]], Tensor], prompts: Sequence[str] = PROMPTS
) -> Tensor:
    """Names of C classes -> their normalised embeddings (C, E): the mean of the normalised embeddings of all prompts.

    `encode` takes all C * P captions at once and returns (C * P, E). Each prompt holds one "{}", the place of the name.
    Raises SettingsError on a prompt without a place for the name, EmptyDataset without names.
    """
    if not names:
        raise EmptyDataset("zero-shot classification needs the names of its classes")
    unusable = [prompt for prompt in prompts if "{}" not in prompt]
    if unusable or not prompts:
        raise SettingsError(f"each prompt must hold {{}}, the place of the name; not so: {unusable or 'nothing'}")
    embeddings = encode([prompt.replace("{}", name) for name in names for prompt in prompts])
    each = F.normalize(embeddings, dim=-1).unflatten(0, (len(names), len(prompts)))  # (C, P, E)
    return F.normalize(each.mean(1), dim=-1)


def logits(images: Tensor, weights: Tensor, scale: float = 100.0) -> Tensor:
    """Embeddings (N, E), of any length, and class weights (C, E) -> scaled cosines (N, C). The softmax is over C."""
    return scale * F.normalize(images, dim=-1) @ weights.to(images).T


def accuracy(logits: Tensor, labels: Sequence[int] | Tensor) -> Accuracy:
    """Logits (N, C) and the right class of each picture (N,) -> figures.

    Ties are pessimistic: a class that scores as high as the right one stands before it. Raises EmptyDataset, and
    DataError on labels that are not 0 .. C - 1, one per row.
    """
    labels = torch.as_tensor(labels, device=logits.device)
    pictures, classes = logits.shape
    if not pictures:
        raise EmptyDataset("there is no picture to classify")
    if labels.shape != (pictures,) or labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"labels must be {pictures} whole numbers from 0 to {classes - 1}, one per picture")
    right = logits.gather(1, labels[:, None])
    rank = (~(logits < right)).sum(1)  # the right class counts itself: 1 is the best rank
    sizes = labels.bincount(minlength=classes)
    hits = labels[rank <= 1].bincount(minlength=classes)
    present = sizes > 0
    return Accuracy(
        top1=float((rank <= 1).double().mean()),
        top5=float((rank <= 5).double().mean()),
        mean_per_class=float((hits[present] / sizes[present].double()).mean()),
        chance=1 / classes,
        largest_class=float(sizes.max() / pictures),
        pictures=pictures,
        classes=classes,
    )
