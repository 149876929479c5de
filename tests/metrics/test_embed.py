"""A data set through encoders, in batches."""

from __future__ import annotations

import pytest
import torch

from zoo.errors import EmptyDataset
from zoo.metrics.embed import embed

PAIRS = [(torch.full((3, 4, 4), float(i)), torch.tensor([i, 2 * i])) for i in range(7)]


def image(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1)[:, :2].to(torch.bfloat16)


def text(x: torch.Tensor) -> torch.Tensor:
    return x.double()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_every_sample_once_in_order_whatever_the_batch(batch_size: int):
    images, texts = embed((image, text), PAIRS, batch_size=batch_size)
    assert images.tolist() == [[i, i] for i in range(7)]
    assert texts.tolist() == [[i, 2 * i] for i in range(7)]
    assert images.dtype == texts.dtype == torch.float32


def test_a_column_without_encoder_is_left_out():
    (texts,) = embed((None, text), PAIRS)
    assert texts.shape == (7, 2)


def test_nothing_is_differentiated():
    weight = torch.ones(2, requires_grad=True)
    (texts,) = embed((None, lambda x: x * weight), PAIRS)
    assert not texts.requires_grad
    (texts * weight).sum().backward()  # and what comes back can be learnt from


def test_an_empty_data_set_is_refused():
    with pytest.raises(EmptyDataset):
        embed((image,), [])
