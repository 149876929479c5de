"""The linear probe finds what is linear, at the optimum, and the same again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from zoo.errors import DataError, SettingsError
from zoo.metrics.linear_probe import fit, linear_probe, split


def blobs(samples: int, distance: float, seed: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Clouds around the axes, in features of very different scales, far from zero."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % classes
    x = torch.randn(samples, 8, generator=generator) + distance * F.one_hot(labels, 8)
    return x * torch.logspace(-3, 3, 8) + 100, labels


def test_clouds_that_lie_apart_are_told_apart():
    assert linear_probe(blobs(120, 12, seed=0), blobs(90, 12, seed=1)).accuracy == 1


def test_clouds_that_touch_are_told_apart_better_than_by_chance():
    assert 0.5 < linear_probe(blobs(300, 2, seed=0), blobs(300, 2, seed=1)).accuracy < 1


def test_noise_is_not_told_apart():
    assert linear_probe(blobs(200, 0, seed=0), blobs(600, 0, seed=1)).accuracy == pytest.approx(1 / 3, abs=0.08)


def test_the_same_seed_gives_the_same_answer_bit_for_bit():
    first, again = (linear_probe(blobs(90, 1, seed=0), blobs(90, 1, seed=1), seed=3) for _ in range(2))
    assert torch.equal(first.weight, again.weight) and torch.equal(first.bias, again.bias)
    assert (first.accuracy, first.strength) == (again.accuracy, again.strength)


def test_the_weights_take_raw_features():
    test_x, labels = blobs(90, 3, seed=1)
    probe = linear_probe(blobs(90, 3, seed=0), (test_x, labels))
    guesses = (test_x.double() @ probe.weight.T + probe.bias).argmax(1)
    assert float((guesses == labels).double().mean()) == probe.accuracy


def test_the_fit_is_the_optimum():
    x, labels = blobs(60, 1, seed=0)
    x = (x.double() - x.mean(0)) / x.std(0)
    weight, bias = (p.requires_grad_() for p in fit(x, labels, 3, strength=0.1, steps=200))
    loss = F.cross_entropy(x @ weight.T + bias, labels) + 0.05 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, [weight, bias]):
        assert gradient.abs().max() < 1e-5


def test_stronger_regularisation_gives_smaller_weights():
    x, labels = blobs(60, 1, seed=0)
    weights = [linear_probe((x, labels), (x, labels), strengths=[s]).weight * x.std(0) for s in (10, 0.1, 1e-4)]
    lengths = [float(weight.norm()) for weight in weights]
    assert lengths == sorted(lengths)


def test_the_held_out_samples_choose_the_strength():
    x, labels = torch.randn(40, 60, generator=torch.Generator().manual_seed(3)), torch.arange(40) % 2
    x[:, 0] += labels * 1.5  # one feature says something, 59 are for learning by heart
    probe = linear_probe((x, labels), (x, labels), strengths=[1e-6, 1.0])
    assert (probe.strength, probe.validation_accuracy) == (1.0, 5 / 8)  # 15 of 16 on what it learnt from, not all


def test_every_class_is_held_out_in_its_share():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 10)
    held_out = split(labels, 0.2, seed=5)
    assert labels[held_out].bincount().tolist() == [10, 4, 2]
    assert not torch.equal(held_out, split(labels, 0.2, seed=6))


def test_a_feature_that_never_changes_is_no_trouble():
    x, labels = blobs(60, 12, seed=0)
    x[:, 7] = 5.0
    assert linear_probe((x, labels), (x, labels)).accuracy == 1


def test_features_made_without_gradients_will_do():
    with torch.inference_mode():
        x, labels = blobs(60, 12, seed=0)
        x = x.double()
    assert linear_probe((x, labels), (x, labels)).accuracy == 1


def test_what_cannot_be_probed_is_refused():
    x, labels = blobs(30, 1, seed=0)
    with pytest.raises(DataError, match="two classes"):
        linear_probe((x, labels * 0), (x, labels))
    with pytest.raises(DataError, match="test must be features"):
        linear_probe((x, labels), (x, labels[:-1]))
    with pytest.raises(SettingsError):
        linear_probe((x, labels), (x, labels), strengths=[])
