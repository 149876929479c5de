"""The safety checker says what the original says, and generate blackens what it names."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor, nn
from transformers import CLIPConfig

from zoo import catalog, weights
from zoo.converters.safety_checker import to_ours
from zoo.models.clip import VitConfig
from zoo.models.safety_checker import SafetyChecker, SafetyCheckerConfig
from zoo.models.stable_diffusion import hidden

TINY = SafetyCheckerConfig(image=VitConfig(size=28, patch=14, width=64, depth=2, heads=1), embed=12)


@pytest.fixture(scope="module")
def twins() -> tuple[nn.Module, SafetyChecker]:
    torch.manual_seed(0)
    vision = {
        "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 1,
        "image_size": 28, "patch_size": 14, "hidden_act": "quick_gelu",
    }  # fmt: skip
    theirs = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=12)).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():  # random pictures lie close together: thresholds among their cosines
        found = theirs.visual_projection(theirs.vision_model(images()).pooler_output)
        for name, share in (("concept_embeds", 0.98), ("special_care_embeds", 0.9)):
            cosines = nn.functional.normalize(found) @ nn.functional.normalize(getattr(theirs, name)).T
            getattr(theirs, f"{name}_weights").copy_(cosines.quantile(share, 0))
    state, _ = to_ours(theirs.state_dict(), {})
    ours = weights.load(SafetyChecker(TINY), {name: tensor.clone() for name, tensor in state.items()})
    return theirs, ours.eval()


def images() -> Tensor:
    torch.manual_seed(1)
    return 3 * torch.randn(200, 3, 28, 28) * torch.rand(200, 1, 1, 1)


def their_flags(theirs: nn.Module, images: Tensor) -> list[bool]:
    pictures = [torch.ones(3, 2, 2) for _ in images]
    return theirs(images, pictures)[1]


def test_flags_are_those_of_the_original_also_near_concepts_of_special_care(twins):
    theirs, ours = twins
    expected = their_flags(theirs, images())
    assert 20 < sum(expected) < 180
    assert ours.flags(images()).tolist() == expected
    with torch.no_grad():
        kept = ours.special_thresholds.clone()
        ours.special_thresholds.fill_(2)  # without them fewer are near enough: the stricter threshold counts
        assert ours.flags(images()).sum() < sum(expected)
        ours.special_thresholds.copy_(kept)


def test_pictures_are_cut_to_the_middle_and_prepared_as_for_clip(twins):
    found = twins[1].prepared(torch.full((2, 3, 56, 84), 0.25))
    assert found.shape == (2, 3, 28, 28)
    assert found[0, 0, 5, 5] == pytest.approx((0.25 - 0.48145466) / 0.26862954, abs=1e-5)
    sides = torch.zeros(1, 3, 28, 84)
    sides[..., :28] = sides[..., 56:] = 1
    assert twins[1].prepared(sides)[0, 0, :, 2:-2].max() < 0  # black, the middle


def test_what_should_not_be_shown_is_black_and_said(caplog):
    pictures = torch.ones(3, 3, 4, 4)
    with caplog.at_level(logging.WARNING, "zoo.models"):
        found = hidden(pictures, torch.tensor([False, True, False]))
    assert found.sum((1, 2, 3)).tolist() == [48, 0, 48] and "1 of 3" in caplog.text
    caplog.clear()
    assert torch.equal(hidden(pictures, torch.zeros(3, dtype=torch.bool)), pictures) and not caplog.text


def test_the_card_is_of_the_published_size():
    card = catalog.find("img_checking", "stable-diffusion-safety-checker")
    with torch.device("meta"):
        model = card.build(card.config)
    assert sum(parameter.numel() for parameter in model.parameters()) == card.params
