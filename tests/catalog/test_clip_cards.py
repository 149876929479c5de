from __future__ import annotations

import re

import pytest
import torch

from zoo import catalog
from zoo.catalog.clip import tokenizer
from zoo.errors import DataError, WeightsMismatch

CARDS = catalog.cards("txt_img_matching")
SIZED = [card for card in CARDS if card.config]
# Millions of parameters as the sources give them.
PUBLISHED_MILLIONS = {
    "clip-base-p32-224": 151.28,
    "clip-base-p16-224": 149.62,
    "clip-large-p14-224": 427.62,
    "clip-large-p14-336": 427.94,
    "clip-resnet50-224": 102.01,
    "clip-resnet101-224": 119.69,
    "clip-resnet50x4-288": 178.30,
    "clip-resnet50x16-384": 290.98,
    "clip-resnet50x64-448": 623.26,
    "chinese-clip-rn50": 77,
    "chinese-clip-vit-base-p16": 188,
    "chinese-clip-vit-large-p14": 406,
    "chinese-clip-vit-large-p14-336": 407,
    "chinese-clip-vit-huge-p14": 958,
}
every_card = pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
every_sized_card = pytest.mark.parametrize("card", SIZED, ids=lambda card: card.name)


def test_the_models_that_the_readme_promises_are_here():
    names = catalog.list_models("txt_img_matching")
    assert len([n for n in names if re.fullmatch(r"clip-(base|large|resnet)\S*-\d{3}", n)]) == 9
    assert len([n for n in names if n.endswith("-laion2b")]) == 4
    assert len([n for n in names if n.startswith("chinese-clip-")]) == 5
    assert len([n for n in names if n.startswith("altclip-")]) == 3
    assert {"clip", "clip-emoji-tiny"} <= set(names)


@every_sized_card
def test_the_network_of_a_card_has_the_parameters_that_were_published(card):
    with torch.device("meta"):
        model = card.build(card.config)
    count = sum(p.numel() for p in model.parameters())
    assert count == card.params
    if millions := PUBLISHED_MILLIONS.get(card.name):
        digits = 2 if isinstance(millions, float) else 0
        assert round(count / 1e6, digits) == millions


@every_sized_card
def test_a_file_of_full_precision_is_as_large_as_its_parameters(card):
    for file in card.files[:1]:
        if file.size and not file.name.startswith(("ViT", "RN")):  # OpenAI's are half in half precision
            assert file.size == pytest.approx(4 * card.params, rel=0.01)


@every_card
def test_a_card_says_licence_and_source_and_every_hash_is_one(card):
    assert card.licence
    assert card.source
    for file in (*card.files, *card.alternatives, *([card.config_file] if card.config_file else [])):
        assert file.url or file.repo or file.packaged
        assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
        if file.url and file.sha256 and "openai" in file.url:
            assert file.sha256 in file.url


def test_pinned_files_are_all_different():
    hashes = [file.sha256 for card in CARDS for file in card.files if file.sha256 and not file.packaged]
    assert len(hashes) == len(set(hashes)) == 15


@every_sized_card
def test_a_card_preprocesses_pictures_to_its_own_size(card):
    from PIL import Image

    transform = card.transform(card.config)
    size = card.config["image"]["size"]
    assert transform(Image.new("RGB", (size, size))).shape == (3, size, size)
    assert (transform.resize == "squash") == card.name.startswith("chinese")


@every_card
def test_openais_activation_is_on_the_cards_of_those_who_used_it(card):
    sizes = card.config or {"image": {}, "text": {}}
    towers = [sizes[tower]["activation"] for tower in ("image", "text") if "activation" in sizes[tower]]
    if card.name.endswith("laion2b"):
        assert set(towers) == {"gelu"}
    elif card.name.startswith("clip-") and card.config:
        assert set(towers) == {"quick_gelu"}


def test_every_head_of_the_openai_models_is_64_wide_and_of_the_huge_ones_80():
    for card in SIZED:
        image, text = card.config["image"], card.config["text"]
        assert text["width"] == 64 * text["heads"]
        if "heads" in image:
            assert image["width"] == (80 if "huge" in card.name else 64) * image["heads"]


# --- tokenizers ---
def test_a_clip_tokenizer_is_openais_unless_merges_lie_beside(tmp_path):
    assert tokenizer(SIZED[0].config, {}).vocab_size == 49408
    (tmp_path / "merges.txt.gz").write_text("#version\na b\nab c</w>\n")
    own = tokenizer({"text": {"vocab": 516, "context": 9}}, {"merges.txt.gz": tmp_path / "merges.txt.gz"})
    assert own.tokenize_as_tensor(["abc"]).tolist() == [[514, 513, 515] + [0] * 6]


def test_a_tokenizer_with_other_ids_than_the_weights_is_refused():
    with pytest.raises(WeightsMismatch, match="49408 ids and the weights have 516: put .* merges.txt.gz"):
        tokenizer({"text": {"vocab": 516, "context": 9}}, {})


def test_a_bert_tower_reads_the_vocabulary_beside_it(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "红", "色"]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    text = {"vocab": 7, "context": 6, "pad": 0, "bridge": None}
    found = tokenizer({"text": text}, {"vocab.txt": tmp_path / "vocab.txt"})
    assert found.tokenize_as_tensor(["红色"]).tolist() == [[2, 5, 6, 3, 0, 0]]


@pytest.mark.parametrize(("bridge", "needed"), [(None, "vocab.txt"), (768, "sentencepiece.bpe.model")])
def test_a_tower_without_its_vocabulary_says_which_file_it_needs(bridge, needed):
    with pytest.raises(DataError, match=needed):
        tokenizer({"text": {"vocab": 7, "context": 6, "pad": 0, "bridge": bridge}}, {})


def test_a_config_with_unknown_fields_is_refused():
    with pytest.raises(WeightsMismatch, match="depht"):
        SIZED[0].build({"image": {"depht": 3}})
