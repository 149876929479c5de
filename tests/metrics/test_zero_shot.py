"""Zero-shot classification: the published formula, one pass over the prompts, and honest figures."""

from __future__ import annotations

import zlib

import pytest
import torch

from zoo.errors import DataError, EmptyDataset, SettingsError
from zoo.metrics.zero_shot import PROMPTS, accuracy, class_weights, logits


def encode(texts: list[str]) -> torch.Tensor:
    """A stand-in for a text tower: an embedding that depends on the text alone, of any length."""
    rows = [torch.randn(6, generator=torch.Generator().manual_seed(zlib.crc32(text.encode()))) for text in texts]
    return torch.stack(rows) * torch.tensor([[1.0 + len(text)] for text in texts])


def test_class_weights_are_the_normalised_mean_of_normalised_prompts():
    names = ["a cat", "dog {}", "fish"]
    weights = class_weights(names, encode)
    for name, weight in zip(names, weights, strict=True):
        each = [encode([prompt.replace("{}", name)])[0] for prompt in PROMPTS]
        mean = sum(e / e.norm() for e in each) / len(each)
        torch.testing.assert_close(weight, mean / mean.norm())


def test_all_prompts_are_embedded_in_one_pass():
    calls = []
    class_weights(["a", "b"], lambda texts: calls.append(texts) or encode(texts), ["{}", "an {}", "{} x"])
    assert calls == [["a", "an a", "a x", "b", "an b", "b x"]]


def test_logits_are_scaled_cosines():
    images, weights = torch.randn(5, 6), class_weights(["a", "b", "c"], encode)
    expected = torch.stack([torch.stack([torch.cosine_similarity(i, w, dim=0) for w in weights]) for i in images])
    torch.testing.assert_close(logits(images, weights, scale=20.0), expected * 20)


def test_figures_of_a_known_case():
    scores = torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [1, 2, 3.0]])
    found = accuracy(scores, [0, 0, 1, 2])
    assert found.top1 == 3 / 4
    assert found.top5 == 1
    assert found.mean_per_class == pytest.approx((1 + 0 + 1) / 3)
    assert (found.chance, found.largest_class) == (1 / 3, 2 / 4)
    assert (found.pictures, found.classes) == (4, 3)


def test_a_class_without_pictures_does_not_count():
    assert accuracy(torch.eye(4)[:2], [0, 1]).mean_per_class == 1


def test_top5_counts_the_right_answer_among_five():
    scores = -torch.arange(8.0).expand(2, 8)
    assert accuracy(scores, [4, 5]).top5 == 0.5


@pytest.mark.parametrize("scores", [torch.zeros(6, 7), torch.full((6, 7), float("nan"))])
def test_equal_scores_earn_nothing(scores: torch.Tensor):
    found = accuracy(scores, [0, 1, 2, 3, 4, 5])
    assert found.top1 == found.top5 == found.mean_per_class == 0


def test_what_cannot_be_classified_is_refused():
    with pytest.raises(SettingsError, match="a photo"):
        class_weights(["a"], encode, ["{}", "a photo"])
    with pytest.raises(SettingsError):
        class_weights(["a"], encode, [])
    with pytest.raises(EmptyDataset):
        class_weights([], encode)
    with pytest.raises(EmptyDataset):
        accuracy(torch.zeros(0, 3), [])
    for labels in ([0, 3], [0, -1], [0]):
        with pytest.raises(DataError, match="0 to 2"):
            accuracy(torch.zeros(2, 3), labels)
