"""The two published crops: where they lie, how large they are, and that chance is torch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data import Dequantize, dalle_train_transform, dvae_train_transform
from zoo.errors import BadImage, SettingsError


def ramp(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards, so that a crop tells where it was."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 0 * x], -1).round().astype(np.uint8))


@pytest.mark.parametrize("make", [dvae_train_transform, dalle_train_transform])
@pytest.mark.parametrize("size", [(40, 40), (100, 60), (31, 90), (16, 16)])
def test_any_picture_becomes_a_square_between_0_and_1(make, size):
    torch.manual_seed(0)
    image = make(32)(ramp(*size))
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32
    assert 0 <= image.min() and image.max() <= 1


def test_a_picture_of_the_size_itself_is_only_mirrored():
    picture, torch_picture = ramp(32, 32), torch.from_numpy(np.array(ramp(32, 32))).permute(2, 0, 1) / 255
    torch.manual_seed(0)
    found = [dvae_train_transform(32)(picture) for _ in range(40)]
    mirrored = [image.equal(torch_picture.flip(2)) for image in found]
    assert all(m or image.equal(torch_picture) for m, image in zip(mirrored, found, strict=True))
    assert 8 < sum(mirrored) < 32
    assert dalle_train_transform(32)(picture).equal(torch_picture)


def test_the_transformers_crop_lies_near_the_middle_and_is_never_mirrored():
    torch.manual_seed(0)
    wide = ramp(96, 32)  # the slack is 64 columns: the left edge lies within 24 and 40 of them
    lefts = [float(dalle_train_transform(32)(wide)[0, 0, 0]) * 95 for _ in range(200)]
    assert min(lefts) >= 23.5 and max(lefts) <= 40.5 and max(lefts) - min(lefts) > 12
    image = dalle_train_transform(32)(wide)
    assert (image[0].diff(dim=1) >= 0).all()


def test_the_dvaes_crop_lies_anywhere_and_is_resized_to_9_8_to_3_2():
    torch.manual_seed(0)
    wide = ramp(512, 128)
    found = [dvae_train_transform(32)(wide) for _ in range(300)]
    lefts = [float(image[0].min()) for image in found]
    assert min(lefts) < 0.05 and max(lefts) > 0.6
    # The part of the height that is seen is 32 / t, with t from 36 to 48.
    heights = [float(image[1].max() - image[1].min()) for image in found]
    assert 0.60 < min(heights) < 0.70 and 0.82 < max(heights) < 0.92


def test_chance_is_torchs():
    crop, picture = dvae_train_transform(32), ramp(90, 50)
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append(crop(picture))
    assert found[0].equal(found[1])


def test_dequantising_stays_within_its_levels_and_within_0_and_1():
    grey = Image.new("RGB", (32, 32), (100, 255, 0))
    image = Dequantize(transform=dalle_train_transform(32), levels=4)(grey)
    assert (image[0] - 100 / 255).abs().max() <= 2 / 255 + 1e-6 and image[0].std() > 0.003
    assert image.min() >= 0 and image.max() <= 1


def test_a_damaged_picture_and_a_size_of_zero_are_refused(tmp_path):
    file = tmp_path / "cut.png"
    ramp(64, 64).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(BadImage, match="cannot be decoded"):
        dvae_train_transform(32)(Image.open(file))
    with pytest.raises(SettingsError, match="size"):
        dvae_train_transform(0)
