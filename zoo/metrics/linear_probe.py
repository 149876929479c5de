"""What a linear classifier reads from frozen features (Radford et al. 2021, appendix A.3). N samples, E features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import DataError, SettingsError

STRENGTHS = tuple(10.0**power for power in range(1, -7, -1))


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Shares of samples, 0 to 1. `strength`: the regularisation that did best on the held-out part of the training
    samples, where it reached `validation_accuracy`. `weight` (C, E) and `bias` (C,) take the raw features."""

    accuracy: float
    strength: float
    validation_accuracy: float
    weight: Tensor
    bias: Tensor


def linear_probe(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    strengths: Sequence[float] = STRENGTHS,
    validation: float = 0.2,
    seed: int = 0,
    steps: int = 200,
) -> Probe:
    """Logistic regression on features. `train` and `test` are features (N, E) and class numbers (N,).

    Features are standardised by the training samples, so that one scale of `strengths` suits every model. A share
    `validation` of the training samples, drawn with `seed` from every class alike, chooses among `strengths`; the
    winner is fitted again to all of them. Full-batch L-BFGS in float64, at most `steps` iterations, so the answer is
    the optimum and depends on nothing but its inputs.

    Raises DataError when shapes disagree or only one class is there, SettingsError without strengths.
    """
    if not strengths or not 0 < validation < 1:
        raise SettingsError("a linear probe needs at least one strength, and 0 < validation < 1")
    (x, labels), (test_x, test_labels) = checked(train, "train"), checked(test, "test")
    if x.shape[1] != test_x.shape[1] or len(labels.unique()) < 2:
        raise DataError("a linear probe needs two classes, and as many features in train as in test")
    classes = int(torch.cat([labels, test_labels]).max()) + 1
    mean, spread = x.mean(0), x.std(0, correction=0).clamp_min(1e-8)
    x = (x - mean) / spread

    held_out = split(labels, validation, seed)
    start, best = None, (-1.0, 0.0)
    for strength in sorted(strengths, reverse=True):  # each fit starts from its stronger neighbour's
        start = fit(x[~held_out], labels[~held_out], classes, strength, steps, start)
        best = max(best, (score(x[held_out], labels[held_out], *start), strength))
    weight, bias = fit(x, labels, classes, best[1], steps)
    weight, bias = weight / spread, bias - weight @ (mean / spread)
    return Probe(
        accuracy=score(test_x, test_labels, weight, bias),
        strength=best[1],
        validation_accuracy=best[0],
        weight=weight,
        bias=bias,
    )


def checked(part: tuple[Tensor, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Features (N, E) in float64 and labels (N,), or DataError."""
    # Cloned, since tensors that were made in inference mode cannot take part in learning.
    x, labels = part[0].detach().double().clone(), torch.as_tensor(part[1], device=part[0].device).clone()
    if x.ndim != 2 or labels.shape != x.shape[:1] or not len(x) or labels.min() < 0:
        shapes = f"{(*x.shape,)} and {(*labels.shape,)}"
        raise DataError(f"{name} must be features (N, E) and N class numbers from 0; the shapes are {shapes}")
    return x, labels


def split(labels: Tensor, share: float, seed: int) -> Tensor:
    """True (N,) for the share of samples to hold out: evenly spread over the samples sorted by class, drawn by seed."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    count = min(max(1, round(share * len(labels))), len(labels) - 1)
    held_out = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    held_out[by_class[((torch.arange(count, device=labels.device) + 0.5) * len(labels) / count).long()]] = True
    return held_out


def fit(
    x: Tensor, labels: Tensor, classes: int, strength: float, steps: int, start: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """The weight (C, E) and bias (C,) that minimise mean cross-entropy + strength / 2 * |weight|^2."""
    weight, bias = start or (x.new_zeros(classes, x.shape[1]), x.new_zeros(classes))
    weight, bias = (p.clone().requires_grad_() for p in (weight, bias))
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=steps, tolerance_grad=1e-6, tolerance_change=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, labels) + strength / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def score(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> float:
    """The share of samples whose class is the likeliest."""
    return float(((x @ weight.T + bias).argmax(1) == labels).double().mean())
