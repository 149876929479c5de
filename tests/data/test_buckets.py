"""Pictures keep their aspect ratio: sizes, which of them a picture gets, and what is cut off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data.buckets import BucketDataset, bucket_sizes, crop_to, nearest_size
from zoo.errors import BadImage, SettingsError


@pytest.mark.parametrize(("size", "step", "ratio"), [(512, 64, 2.0), (768, 64, 2.0), (64, 16, 3.0), (256, 64, 4.0)])
def test_sizes_are_multiples_of_the_step_and_no_larger_than_the_square(size: int, step: int, ratio: float):
    sizes = bucket_sizes(size, step, ratio)
    assert (size, size) in sizes and len(sizes) == len(set(sizes)) > 2
    for width, height in sizes:
        assert width % step == height % step == 0 and width * height <= size**2
        assert width * height > size**2 - step * max(width, height)  # none could be longer
        assert 1 / ratio <= width / height <= ratio
        assert (height, width) in sizes
    aspects = [width / height for width, height in sizes]
    assert aspects == sorted(aspects)


def test_sizes_that_cannot_be_are_refused():
    for words in ((500, 64), (32, 64), (512, 64, 0.5)):
        with pytest.raises(SettingsError, match="take a multiple"):
            bucket_sizes(*words)


def test_the_nearest_size_is_nearest_as_a_ratio():
    sizes = [(64, 128), (64, 64), (128, 64)]
    # The middle of 1 and 2 as a ratio is the square root of 2.
    found = [nearest_size(aspect, sizes) for aspect in (0.1, 0.70, 0.72, 1.0, 1.41, 1.42, 9)]
    assert found == [0, 0, 1, 1, 1, 2, 2]


def ramp(width: int, height: int) -> Image.Image:
    """Red says how far right, green how far down."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).round().astype(np.uint8))


@pytest.mark.parametrize("picture", [(200, 100), (400, 300), (40, 20), (33, 71)], ids=str)
@pytest.mark.parametrize("size", [(64, 32), (32, 32), (32, 64)], ids=str)
def test_a_picture_covers_the_size_without_being_stretched(picture: tuple[int, int], size: tuple[int, int]):
    width, height = picture
    seen = []
    for seed in range(8):
        torch.manual_seed(seed)
        image = crop_to(size, ramp(width, height))
        assert image.shape == (3, size[1], size[0]) and 0 <= image.min() and image.max() <= 1
        red, green = image[0, size[1] // 2], image[1, :, size[0] // 2]
        across, down = (
            float(red[-2] - red[1]) * width / (size[0] - 3),
            float(green[-2] - green[1]) * height / (size[1] - 3),
        )
        assert across == pytest.approx(down, rel=0.1)  # pixels of the picture per pixel, either way
        seen.append((round(float(red[0]), 2), round(float(green[0]), 2)))
        # All of one edge is there.
        assert max(float(red[-1] - red[0]), float(green[-1] - green[0])) > 0.9
    longer = width * size[1] != height * size[0]
    assert (len(set(seen)) > 1) == longer  # any part of what is too long


class Pictures(torch.utils.data.Dataset):
    def __init__(self, edges: list[tuple[int, int]]):
        self.edges = edges

    def __len__(self) -> int:
        return len(self.edges)

    def __getitem__(self, i: int) -> tuple[Image.Image, torch.Tensor]:
        return ramp(*self.edges[i]), torch.tensor([i])


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_have_the_size_of_their_group(workers: int):
    sizes = bucket_sizes(64, 16)
    data = BucketDataset(Pictures([(50, 50), (100, 50), (30, 70), (51, 49)]), sizes, workers, progress=False)
    assert data.groups.tolist() == [sizes.index((64, 64)), len(sizes) - 1, 0, sizes.index((64, 64))]
    assert [data.group_names[group] for group in data.groups] == ["64x64", "80x48", "48x80", "64x64"]
    for i in range(4):
        image, text = data[i]
        width, height = sizes[data.groups[i]]
        assert image.shape == (3, height, width) and text.tolist() == [i]


def test_a_picture_without_pixels_is_named_bad():
    with pytest.raises(BadImage, match="no pixels"):
        crop_to((64, 64), Image.new("RGB", (0, 5)))
