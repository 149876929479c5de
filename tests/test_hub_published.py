"""The published checkpoints themselves: downloads of 0.2 to 5 GB each. `pytest -m hub -k clip-base-p32-224`."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from zoo import AutoLoader, catalog

COLOURS = {"red": "红色", "green": "绿色", "blue": "蓝色"}
CLIPS = [card for card in catalog.cards("txt_img_matching") if card.files and card.config]


@pytest.mark.hub
@pytest.mark.parametrize("card", CLIPS, ids=lambda card: card.name)
def test_a_published_clip_tells_colours_apart(card: catalog.Card, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.getbasetemp() / "models"
    loader = AutoLoader(card.task, card.name, model_dir=folder, device="cpu")
    model, tokenizer, transform = loader.get_model(), loader.get_tokenizer(), loader.get_transform()
    pictures = torch.stack([transform(Image.new("RGB", (300, 260), colour)) for colour in COLOURS])
    words = COLOURS.values() if card.languages == ("zh",) else [f"a plain {colour} picture" for colour in COLOURS]
    with torch.inference_mode():
        similarity = model.similarity(pictures, tokenizer.tokenize_as_tensor(list(words)))
    assert similarity.argmax(0).tolist() == [0, 1, 2]
    assert model.logit_scale.exp().item() == pytest.approx(100, rel=0.6)
