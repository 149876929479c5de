"""What ships is what its card says."""

from __future__ import annotations

import hashlib
from argparse import Namespace

import pytest
from torch.utils.data import Subset

from zoo import AutoLoader
from zoo.catalog import cards, find
from zoo.commands.evaluate_text2img import found_again
from zoo.commands.model_options import load_matcher
from zoo.data import open_dataset
from zoo.data.codes import fingerprint
from zoo.hub import fetch
from zoo.metrics.embed import embed
from zoo.metrics.reconstruction import reconstruction
from zoo.metrics.retrieval import recall

TEMPERATURE = 0.7  # that of the card's figures
TINY = find("txt_img_matching", "clip-emoji-tiny")


@pytest.mark.parametrize("file", [f for card in cards() for f in card.files if f.packaged], ids=lambda f: f.packaged)
def test_packaged_files_are_those_of_the_card(file):
    path = fetch(file)
    assert path.stat().st_size == file.size
    assert hashlib.sha256(path.read_bytes()).hexdigest() == file.sha256


def test_the_tiny_clip_is_small():
    assert fetch(TINY.files[0]).stat().st_size <= 8_000_000
    model = AutoLoader(TINY.task, TINY.name).get_model()
    assert sum(p.numel() for p in model.parameters()) == TINY.params


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_tiny_clip_finds_held_out_captions_as_often_as_its_card_says(language):
    loader = AutoLoader(TINY.task, TINY.name)
    model = loader.get_model()
    dataset = open_dataset("emoji", "test", loader.get_transform(), loader.get_tokenizer(), language=language)
    captions = [dataset.caption(dataset.row(i)) for i in range(len(dataset))]
    owner = [captions.index(caption) for caption in captions]  # pictures whose captions are alike share them
    found = recall(*embed([model.encode_image, model.encode_text], dataset), image_owner=owner, text_owner=owner)
    i2t, t2i = (100 * found[way].recall[1] for way in ("picture_to_text", "text_to_picture"))
    assert i2t >= 55
    assert i2t == pytest.approx(TINY.figures[f"emoji_test_{language}_i2t_r1"], abs=0.3)
    assert t2i == pytest.approx(TINY.figures[f"emoji_test_{language}_t2i_r1"], abs=0.3)


@pytest.mark.parametrize("name", ["dvae-emoji-tiny", "vqgan-emoji-tiny"])
def test_the_tiny_image_tokenizers_bring_pictures_back_as_their_cards_say(name):
    card = find("img_tokenizing", name)
    loader = AutoLoader(card.task, card.name)
    model, dataset = loader.get_model(), open_dataset("emoji", "test", loader.get_transform(), language=None)
    assert sum(p.numel() for p in model.parameters()) == card.params
    found = reconstruction(model.encode, model.decode, model.vocab, Subset(dataset, range(0, len(dataset), 3)))
    assert found["psnr"] == pytest.approx(card.figures["emoji_test_psnr"], abs=0.3)
    assert found["code_perplexity"] == pytest.approx(card.figures["emoji_test_code_perplexity"], rel=0.1)


@pytest.mark.parametrize(
    "name, tokenizer", [("dalle-emoji-tiny", "dvae-emoji-tiny"), ("clip-gen-emoji-tiny", "vqgan-emoji-tiny")]
)
def test_the_tiny_painters_draw_what_is_found_again_about_as_often_as_their_cards_say(name, tokenizer):
    card = find("text2img", name)
    model = AutoLoader(card.task, card.name, device="cpu").get_model()
    assert sum(p.numel() for p in model.parameters()) == card.params
    pictures = AutoLoader("img_tokenizing", tokenizer, device="cpu").get_model()
    assert fingerprint(model.image_tokenizer) == fingerprint(pictures)  # so that codes of one are those of the other
    share = share_found_again(model, 15, temperature=TEMPERATURE)
    assert share == pytest.approx(card.figures["emoji_test_en_r10"], abs=9)  # of 126 pictures; 0.5 by chance


def test_the_tiny_vae_brings_pictures_back_as_its_card_says():
    card = find("img_tokenizing", "kl-vae-emoji-tiny")
    loader = AutoLoader(card.task, card.name)
    model, dataset = loader.get_model(), open_dataset("emoji", "test", loader.get_transform(), language=None)
    assert sum(p.numel() for p in model.parameters()) == card.params
    found = reconstruction(model.encode, model.decode, None, Subset(dataset, range(0, len(dataset), 3)))
    assert found["psnr"] == pytest.approx(card.figures["emoji_test_psnr"], abs=0.3)


def test_the_tiny_stable_diffusion_draws_what_is_found_again_about_as_often_as_its_card_says():
    card = find("text2img", "sd-emoji-tiny")
    model = AutoLoader(card.task, card.name, device="cpu").get_model()
    assert sum(p.numel() for p in model.parameters()) == card.params
    vae = AutoLoader("img_tokenizing", "kl-vae-emoji-tiny", device="cpu").get_model()
    assert fingerprint(model.vae) == fingerprint(vae) and model.vae.scale == vae.scale
    share = share_found_again(model, 20)
    assert share == pytest.approx(card.figures["emoji_test_en_r10"], abs=11)  # of 94 pictures; 0.5 by chance


def share_found_again(model, every: int, **words) -> float:
    """The percentage of drawn English captions of the test split that are among the first ten of the tiny CLIP."""
    matcher = load_matcher(Namespace(model=TINY.name, model_dir=None, weights=None, device="cpu"))
    dataset = open_dataset("emoji", "test", language=None)
    captions = list(dict.fromkeys(dataset.row(i)["caption_en"] for i in range(len(dataset))))
    prompts = captions[::every]
    drawn = model.generate(prompts, progress=False, **words)
    return 100 * found_again(matcher, [pictures[0] for pictures in drawn], prompts, captions)[10]


def test_what_draws_is_small():
    files = {file.packaged: file.size for card in cards() for file in card.files if file.packaged}
    for parts in (("dalle", "dvae"), ("clip-gen", "vqgan"), ("sd-",)):  # the last holds its VAE
        assert sum(size for name, size in files.items() if any(part in name for part in parts)) <= 25_000_000
