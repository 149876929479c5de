"""Recall at k: its definition, ties, several right answers, and memory."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import DataError, EmptyDataset
from zoo.metrics import retrieval
from zoo.metrics.retrieval import recall


def by_hand(queries, candidates, query_owner, candidate_owner, k) -> float:
    """The definition, one query at a time: wrong answers that score alike stand first."""
    hits = 0
    for query, owner in zip(queries.double(), query_owner, strict=True):
        scored = [
            (round(float(query @ c / (query.norm() * c.norm())), 7), own != owner)
            for c, own in zip(candidates.double(), candidate_owner, strict=True)
        ]
        hits += any(not wrong for _, wrong in sorted(scored, key=lambda s: (-s[0], not s[1]))[:k])
    return hits / len(queries)


def pairs(images: int, captions_each: int, ties: bool, seed: int = 0):
    torch.manual_seed(seed)
    texts = images * captions_each
    if ties:  # few whole numbers in few dimensions: many equal cosines
        return torch.randint(0, 3, (images, 3)) + 0.5, torch.randint(0, 3, (texts, 3)) + 0.5
    return torch.randn(images, 8), torch.randn(texts, 8)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("captions_each", [1, 3])
def test_recall_is_the_share_of_queries_with_a_right_answer_among_the_first_k(ties: bool, captions_each: int):
    images, texts = pairs(17, captions_each, ties)
    owner = [i // captions_each for i in range(len(texts))]
    found = recall(images, texts, text_owner=owner)
    for k in (1, 5, 10):
        assert found["picture_to_text"].recall[k] == pytest.approx(by_hand(images, texts, range(17), owner, k))
        assert found["text_to_picture"].recall[k] == pytest.approx(by_hand(texts, images, owner, range(17), k))


def test_pictures_may_share_a_caption():
    texts = torch.eye(2)
    images = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1.0]])
    found = recall(images, texts, image_owner=[0, 0, 1])
    assert found["picture_to_text"].recall[1] == found["text_to_picture"].recall[1] == 1
    assert (found["text_to_picture"].queries, found["text_to_picture"].candidates) == (2, 3)


def test_ranks_are_those_of_the_best_right_answer():
    images = torch.tensor([[1.0, 0], [0.0, 1], [0.6, 0.8]])
    texts = torch.tensor([[0.9, 0.1], [1.0, 0.05], [0.5, 0.9]])
    ranks = recall(images, texts)["picture_to_text"]  # the right answer stands second, third, first
    assert ranks.recall == {1: 1 / 3, 5: 1, 10: 1}
    assert (ranks.median_rank, ranks.mean_rank) == (2, 2)


def test_equal_embeddings_for_everything_earn_nothing():
    found = recall(torch.ones(30, 4) / 3, torch.ones(30, 4) / 7)
    for ranks in found.values():
        assert ranks.recall == {1: 0, 5: 0, 10: 0}
        assert ranks.median_rank == ranks.mean_rank == 30


def test_rounding_noise_on_equal_embeddings_earns_nothing():
    torch.manual_seed(0)
    images = torch.randn(1, 16) + torch.randn(40, 16) * 1e-7
    assert recall(images, images)["picture_to_text"].recall[1] == 0


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_embeddings_that_are_no_numbers_earn_nothing(broken: float):
    images = torch.eye(6)
    images[2:] = broken
    found = recall(images, torch.eye(6))
    assert found["picture_to_text"].recall[1] == pytest.approx(2 / 6)
    assert found["text_to_picture"].recall[1] == 0  # the broken pictures may be anyone's


def test_the_block_does_not_matter():
    images, texts = pairs(40, 3, ties=False)
    owner = [i // 3 for i in range(120)]
    whole = recall(images, texts, text_owner=owner, block=10**9)
    for block in (1, 121, 1000):
        assert recall(images, texts, text_owner=owner, block=block) == whole


def test_no_more_scores_than_the_block_are_held_at_once(monkeypatch: pytest.MonkeyPatch):
    largest = []
    where = torch.Tensor.masked_fill
    monkeypatch.setattr(torch.Tensor, "masked_fill", lambda x, *a: largest.append(x.numel()) or where(x, *a))
    recall(*pairs(50, 4, ties=False), text_owner=[i // 4 for i in range(200)], block=600)
    assert 200 <= max(largest) <= 600
    assert retrieval.recall.__kwdefaults__["block"] < 2**24  # 64 MiB of float32 is a lot, a whole COCO matrix is not


def test_the_length_of_an_embedding_does_not_matter():
    images, texts = pairs(20, 1, ties=False)
    assert recall(images * torch.rand(20, 1).add(0.1), texts * 50) == recall(images, texts)


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(EmptyDataset, match="0 and 3"):
        recall(torch.zeros(0, 4), torch.zeros(3, 4))
    with pytest.raises(DataError, match="differ in shape"):
        recall(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(DataError, match="1 of 3 queries have no right answer, the first is 2"):
        recall(torch.ones(3, 4), torch.ones(2, 4))
    with pytest.raises(DataError, match="text_owner"):
        recall(torch.ones(3, 4), torch.ones(3, 4), text_owner=[0, 1])
