from __future__ import annotations

import pytest
import torch

from zoo.errors import EmptyDataset
from zoo.metrics.reconstruction import reconstruction


def grey(image: torch.Tensor) -> torch.Tensor:
    """Each pixel's red in four levels."""
    return (image[:, 0] * 3).round().long()


def picture(codes: torch.Tensor) -> torch.Tensor:
    return (codes / 3)[:, None].expand(-1, 3, -1, -1)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_figures_are_those_of_all_pictures_whatever_the_batch(batch_size):
    levels = [0.1, 0.1, 0.7, 1.1 / 3, 0.3]
    dataset = [(torch.full((3, 2, 2), level), None) for level in levels]
    found = reconstruction(
        grey, picture, 4, dataset, batch_size=batch_size, distance=lambda a, b: (a - b).abs().amax((1, 2, 3))
    )
    assert found["pictures"] == 5
    errors = torch.tensor([0.1, 0.1, 0.7 - 2 / 3, 0.1 / 3, 1 / 3 - 0.3], dtype=torch.float64)
    assert found["psnr"] == pytest.approx(float((-20 * errors.log10()).mean()), abs=1e-4)
    assert found["lpips"] == pytest.approx(float(errors.mean()), abs=1e-6)
    assert found["code_usage"] == 0.75  # 0, 1 and 2 of four
    shares = torch.tensor([0.4, 0.4, 0.2])
    assert found["code_perplexity"] == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())))


def test_without_a_distance_none_is_told():
    assert "lpips" not in reconstruction(grey, picture, 4, [(torch.zeros(3, 2, 2), None)])


def test_nothing_cannot_be_reconstructed():
    with pytest.raises(EmptyDataset):
        reconstruction(grey, picture, 4, [])
