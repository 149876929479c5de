"""Few pictures beside others of their kind: every batch is half of each, and the loss is the paper's."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from zoo.data.dreambooth import Captioned, DreamBooth, dreambooth_collate


class Flat(torch.utils.data.Dataset):
    """Pictures of one colour each, numbered from `first`."""

    def __init__(self, first: int, count: int):
        self.first, self.count = first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[torch.Tensor, None]:
        if i >= self.count:
            raise IndexError(i)
        return torch.full((3, 2, 2), float(self.first + i)), None


@pytest.fixture
def both() -> DreamBooth:
    return DreamBooth(Captioned(Flat(0, 3), torch.tensor([1, 2])), Captioned(Flat(100, 7), torch.tensor([3, 4])))


def test_all_are_seen_and_the_fewer_again(both):
    assert len(both) == 7
    batches = DataLoader(both, batch_size=7, collate_fn=partial(dreambooth_collate, 1.0))
    (batch,) = batches
    assert batch["image"][:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1, 2, 0, *range(100, 107)]
    assert batch["text"].tolist() == [[1, 2]] * 7 + [[3, 4]] * 7


@pytest.mark.parametrize("prior_weight", [1.0, 0.25])
def test_the_weighted_mean_is_the_papers_sum(both, prior_weight):
    batch = dreambooth_collate(prior_weight, [both[i] for i in range(5)])
    torch.manual_seed(0)
    errors = torch.rand(10)
    expected = errors[:5].mean() + prior_weight * errors[5:].mean()  # E over the thing + lambda E over its kind
    torch.testing.assert_close((errors * batch["weight"]).mean(), expected)
