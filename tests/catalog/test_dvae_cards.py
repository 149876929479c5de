from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image

from zoo import AutoLoader, catalog, weights
from zoo.catalog.dvae import CARDS
from zoo.errors import SettingsError, WeightsMismatch
from zoo.models.dvae import Dvae, DvaeConfig

SIZED = [card for card in CARDS if card.config]
TASK = "img_tokenizing"
every_sized_card = pytest.mark.parametrize("card", SIZED, ids=lambda card: card.name)


@pytest.fixture(autouse=True)
def _listed(monkeypatch):
    monkeypatch.setattr(catalog, "CARDS", CARDS)


@every_sized_card
def test_the_network_of_a_card_has_the_parameters_that_were_published(card):
    with torch.device("meta"):
        model = card.build(card.config)
    assert sum(p.numel() for p in model.parameters()) == card.params
    assert model.config == DvaeConfig.from_dict(card.config)
    sizes = [
        4 * sum(p.numel() for p in part.parameters()) for part in (model.encoder, model.decoder) if part is not None
    ]
    if not card.files[0].packaged:  # in bytes, without names; what is packaged has tests of its own
        assert [file.size for file in card.files] == sizes


@every_sized_card
def test_pictures_become_as_large_as_the_card_says(card):
    image = card.transform(card.config)(Image.new("RGB", (300, 200), (255, 0, 128)))
    assert image.shape == (3, card.config["size"], card.config["size"])
    assert image.mean((1, 2)).tolist() == pytest.approx([1, 0, 128 / 255])


def test_openais_pictures_are_cropped_and_flavas_squashed():
    picture = Image.new("RGB", (300, 100))
    picture.paste((255, 255, 255), (0, 0, 80, 100))  # the left
    openai, flava = (card.transform(card.config)(picture) for card in SIZED if not card.files[0].packaged)
    assert (openai.shape[-1], flava.shape[-1]) == (256, 112)  # 112: FLAVA's codes are as many as its patches
    assert openai.max() < 0.2 and flava.max() > 0.9


def test_openais_two_files_are_one_model(tmp_path):
    torch.manual_seed(0)
    config = DvaeConfig(size=16, vocab=16, hidden=8, stem=4, groups=2, blocks=1)
    model = Dvae(config).eval()
    for part in ("encoder", "decoder"):
        torch.save(getattr(model, part).state_dict(), tmp_path / f"{part}.pkl")
    (tmp_path / "config.json").write_text(json.dumps({"size": 16}))
    loaded = AutoLoader(TASK, "dvae", weights=tmp_path).get_model()
    image = torch.rand(2, 3, 16, 16)
    assert loaded.config == config
    assert torch.equal(loaded.reconstruct(image), model.reconstruct(image))
    (tmp_path / "decoder.pkl").unlink()
    alone = AutoLoader(TASK, "dvae", weights=tmp_path).get_model()
    with pytest.raises(SettingsError, match="can only encode"):
        alone.reconstruct(image)


def test_a_run_folder_is_loaded_by_the_familys_name(tmp_path):
    config = DvaeConfig(size=16, vocab=16, hidden=8, stem=4, groups=2, blocks=1)
    weights.write(Dvae(config).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    loader = AutoLoader(TASK, "dvae", weights=tmp_path)
    assert loader.get_model().config == config
    assert loader.get_transform()(Image.new("RGB", (20, 30))).shape == (3, 16, 16)
    assert loader.get_tokenizer() is None


def test_weights_of_another_size_than_the_card_are_refused(tmp_path):
    config = DvaeConfig(vocab=16, hidden=8, stem=128)
    for part in ("encoder", "decoder"):
        torch.save(getattr(Dvae(config), part).state_dict(), tmp_path / f"{part}.pkl")
    with pytest.raises(WeightsMismatch, match="vocab is 16 in the weights or their config, and 8192 on the card"):
        AutoLoader(TASK, "dvae-openai", weights=tmp_path).get_model()


def test_a_config_of_another_version_is_refused():
    with pytest.raises(WeightsMismatch, match="config is not one of a dVAE"):
        CARDS[0].build({"layers": 3})
