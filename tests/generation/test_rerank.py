"""CLIP chooses the picture that fits."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from zoo import AutoLoader
from zoo.generation.rerank import clip_score


@pytest.fixture(scope="module")
def loader() -> AutoLoader:
    return AutoLoader("txt_img_matching", "clip-emoji-tiny", device="cpu")


def test_scores_are_the_cosines_of_the_model(loader):
    model, tokenizer, transform = loader.get_model(), loader.get_tokenizer(), loader.get_transform()
    pictures = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "white")]
    scores = clip_score(model, tokenizer, transform)("blue square", pictures)
    with torch.no_grad():
        text = model.encode_text(tokenizer.tokenize_as_tensor(["blue square"]))[0]
        for picture, score in zip(pictures, scores, strict=True):
            image = model.encode_image(transform(picture)[None])[0]
            assert score == pytest.approx(float(image @ text / image.norm() / text.norm()), abs=1e-5)
    assert max(scores) == scores[1]


def test_every_picture_fits_the_empty_prompt(loader):
    score = clip_score(loader.get_model(), loader.get_tokenizer(), loader.get_transform())
    assert score(" ", [Image.new("RGB", (64, 64))] * 2) == [0.0, 0.0]
