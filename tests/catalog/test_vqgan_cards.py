from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image

from zoo import AutoLoader, catalog, weights
from zoo.catalog.vqgan import CARDS
from zoo.errors import WeightsMismatch
from zoo.models.vqgan import Vqgan, VqganConfig

SIZED = [card for card in CARDS if card.config]
TASK = "img_tokenizing"
TINY = VqganConfig(size=16, widths=(32, 32), blocks=1, attention=(1,), latent=8, vocab=10, code_width=8)
every_sized_card = pytest.mark.parametrize("card", SIZED, ids=lambda card: card.name)


@pytest.fixture(autouse=True)
def _listed(monkeypatch):
    monkeypatch.setattr(catalog, "CARDS", CARDS)


@every_sized_card
def test_the_network_of_a_card_has_its_parameters_and_says_every_field(card):
    with torch.device("meta"):
        model = card.build(card.config)
    assert sum(p.numel() for p in model.parameters()) == card.params
    assert dataclasses.asdict(model.config) == dict(card.config)


@every_sized_card
def test_the_weights_of_a_card_agree_with_it(card):
    with torch.device("meta"):
        state = card.build(card.config).state_dict()
    assert card.convert(state, card.config)[1] == card.config


@every_sized_card
def test_files_are_as_large_as_their_tensors_or_larger(card):
    for file in (*card.files, *card.alternatives):
        assert file.size is None or file.size > 0.99 * 4 * card.params


@every_sized_card
def test_pictures_become_as_large_as_the_card_says_and_stay_within_0_and_1(card):
    image = card.transform(card.config)(Image.new("RGB", (300, 200), (255, 0, 128)))
    assert image.shape == (3, 256, 256)
    assert image.mean((1, 2)).tolist() == pytest.approx([1, 0, 128 / 255])


def test_grids_and_sides_are_the_published_ones():
    with torch.device("meta"):
        models = {card.name: card.build(card.config) for card in SIZED}
    assert {name: (model.grid, model.vocab) for name, model in models.items()} == {
        "vqgan-imagenet-f16-1024": (16, 1024),
        "vqgan-imagenet-f16-16384": (16, 16384),
        "vqgan-openimages-gumbel-f8": (32, 8192),
        "vqgan-sber-gumbel-f8": (32, 8192),
        "vqgan-sber-gumbel-f8-dwt": (32, 8192),
        "vqgan-dalle-mini": (16, 16384),
        "vqgan-coco": (16, 16384),
        "vq-f4": (64, 8192),
        "vq-f8": (32, 16384),
        "vq-f8-n256": (32, 256),
    }


def test_latent_diffusions_first_stages_have_the_published_numbers_of_tensors():
    with torch.device("meta"):
        states = {card.name: card.build(card.config).state_dict() for card in SIZED if card.name.startswith("vq-")}
    assert {name: len(state) for name, state in states.items()} == {"vq-f4": 205, "vq-f8": 299, "vq-f8-n256": 299}


def test_weights_of_any_size_are_loaded_by_the_familys_name(tmp_path):
    torch.manual_seed(0)
    model = Vqgan(TINY).eval()
    weights.write(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(TINY)))
    loader = AutoLoader(TASK, "vqgan", weights=tmp_path)
    image = loader.get_transform()(Image.new("RGB", (20, 30), (200, 100, 0)))[None]
    assert image.shape == (1, 3, 16, 16)
    found = loader.get_model()
    assert found.config == TINY and loader.get_tokenizer() is None
    assert torch.equal(found.reconstruct(image), model.reconstruct(image))


def test_weights_of_another_size_than_the_card_are_refused(tmp_path):
    config = dataclasses.replace(TINY, widths=(32, 32, 32, 32, 32), attention=(4,), blocks=2)
    torch.save({"state_dict": Vqgan(config).state_dict()}, tmp_path / "last.ckpt")
    with pytest.raises(WeightsMismatch, match="is not vqgan-imagenet-f16-1024"):
        AutoLoader(TASK, "vqgan-imagenet-f16-1024", weights=tmp_path / "last.ckpt").get_model()


def test_a_config_of_another_version_is_refused():
    with pytest.raises(WeightsMismatch, match="config is not one of a VQGAN"):
        CARDS[0].build({"layers": 3})
