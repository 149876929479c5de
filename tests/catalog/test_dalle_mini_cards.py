from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace

import msgpack
import pytest
import torch
from PIL import Image

from zoo import AutoLoader, catalog, weights
from zoo.auto_loader import read_parts
from zoo.catalog.dalle_mini import CARDS, MEGA, MINI
from zoo.converters.dalle_mini import BLOCK, ENDS
from zoo.errors import DataError, WeightsMismatch
from zoo.models.dalle_mini import DalleMiniConfig, dalle_mini
from zoo.models.dalle_mini_bart import BartConfig
from zoo.models.vqgan import VqganConfig
from zoo.tokenizers.clip_bpe import ALPHABET

SIZED = [card for card in CARDS if card.config]
TASK = "text2img"
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
TINY = DalleMiniConfig(
    image=VqganConfig(size=6, widths=(32, 32), blocks=1, attention=(), latent=8, vocab=16, code_width=8, black=0.0),
    transformer=BartConfig(
        text_vocab=300, text_length=8, vocab=16, rows=18, start=16, grid=3, width=16, depth=1, heads=2, hidden=12
    ),
)
every_sized_card = pytest.mark.parametrize("card", SIZED, ids=lambda card: card.name)


@pytest.fixture(autouse=True)
def _listed(monkeypatch):
    monkeypatch.setattr(catalog, "CARDS", CARDS)


def put_vocabulary(folder, suffix: str = "", more: int = 0) -> None:
    pieces = {piece: number for number, piece in enumerate([*SPECIALS, *ALPHABET, *map(str, range(1000, 1000 + more))])}
    (folder / f"vocab{suffix}.json").write_text(json.dumps(pieces))
    (folder / f"merges{suffix}.txt").write_text("#version: 0.2\n")


@every_sized_card
def test_the_network_of_a_card_has_its_parameters_and_every_field_of_a_config(card):
    with torch.device("meta"):
        model = card.build(card.config)
    assert sum(p.numel() for p in model.parameters()) == card.params
    made = dataclasses.asdict(model.config)
    assert made["image"] == card.config["image"]
    assert made["transformer"].items() >= card.config["transformer"].items()
    assert made["transformer"].keys() - card.config["transformer"].keys() == {"start", "init_std"}


@every_sized_card
def test_the_weights_of_a_card_agree_with_it(card):
    with torch.device("meta"):
        state = card.build(card.config).state_dict()
    found = card.convert(state, card.config)[1]
    assert found["image"] == card.config["image"]
    assert found["transformer"] == card.config["transformer"] | {"start": 16384, "init_std": 0.02}


@every_sized_card
def test_files_are_as_large_as_their_tensors_and_the_parts_come_first(card):
    with torch.device("meta"):
        model = card.build(card.config)
    halves = [model.transformer.encoder, model.transformer.decoder]
    groups = [*halves, model.dvae] if len(card.parts) == 3 else [model.transformer, model.dvae]
    counts = [sum(p.numel() for p in group.parameters()) for group in groups]
    width = 2 if len(card.parts) == 3 else 4
    assert [file.name for file in card.files[: len(counts)]] == list(card.parts)
    assert [file.size for file in card.files[: len(counts)]] == [
        count * (width if at + 1 < len(counts) else 4) for at, count in enumerate(counts)
    ]
    assert len(card.files) == len(card.parts) + 2


def test_the_published_counts():
    """kuprel/min-dalle's files and the paper's figures: mini has 0.4 billion, mega 2.6."""
    counts = {}
    for name, sizes in (("mini", MINI), ("mega", MEGA)):
        with torch.device("meta"):
            model = dalle_mini(DalleMiniConfig(transformer=BartConfig(**sizes)))
        counts[name] = sum(p.numel() for p in model.transformer.parameters())
    assert counts == {"mini": 437_833_712, "mega": 2_587_521_024}


@every_sized_card
def test_pictures_become_as_large_as_the_card_says(card):
    image = card.transform(card.config)(Image.new("RGB", (300, 200), (255, 0, 128)))
    assert image.shape == (3, 256, 256)
    assert image.mean((1, 2)).tolist() == pytest.approx([1, 0, 128 / 255])


# --- loading ---
def test_zoos_own_weights_are_loaded_by_the_familys_name_and_draw(tmp_path):
    torch.manual_seed(0)
    model = dalle_mini(TINY).eval()
    weights.write(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(TINY)))
    put_vocabulary(tmp_path)
    loader = AutoLoader(TASK, "dalle-bart", weights=tmp_path)
    found = loader.get_model()
    assert found.config == TINY
    found.tokenizer = model.tokenizer = loader.get_tokenizer()
    assert found.tokenizer.tokenize_as_tensor("").tolist() == [[0, 2, 1, 1, 1, 1, 1, 1]]  # as the config's `empty`
    drawn = found.generate(["cat", ""], n=2, seed=3, progress=False)
    assert drawn == model.generate(["cat", ""], n=2, seed=3, progress=False)
    assert drawn[0][0].size == loader.get_transform()(drawn[0][0]).shape[1:] == (6, 6)


def published(state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """min-dalle's three files. The tables are the converter's: its own tests hold them against the source."""
    files: dict[str, dict] = {"encoder": {}, "decoder": {}, "detoker": {}}
    for name, tensor in state.items():
        whole, half, rest = name.split(".", 2)
        if whole == "dvae":
            if half in ("quantize", "post_quant_conv", "decoder"):
                files["detoker"][name.removeprefix("dvae.").replace("quantize.embedding", "embedding")] = tensor
            continue
        number = re.match(r"blocks\.(\d+)\.", rest)
        table, start = (BLOCK, f"layers.{number[1]}.") if number else (ENDS, "")
        theirs = table[rest[number.end() :] if number else rest]
        files[half] |= {start + their: part for their, part in zip(theirs, tensor.chunk(len(theirs)), strict=True)}
    return files


@pytest.mark.parametrize("name", ["dalle-mini-fp16", "dalle-mega-fp16"])
def test_min_dalles_three_files_are_read_as_one_with_the_vocabulary_of_their_size(name, tmp_path, monkeypatch):
    card = next(card for card in CARDS if card.name == name)
    monkeypatch.setattr(catalog, "CARDS", [replace(card, config=None)])  # of any size
    model = dalle_mini(TINY)
    for part, (file, tensors) in zip(card.parts, published(model.state_dict()).items(), strict=True):
        assert part.startswith(file)
        torch.save({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / part)
    (tmp_path / "config.json").write_text(json.dumps({"decoder_start_token_id": 17, "encoder_attention_heads": 2}))
    put_vocabulary(tmp_path, "", more=5)  # of mega, which lies in the same folder
    put_vocabulary(tmp_path, "_mini", more=3)
    loader = AutoLoader(TASK, name, weights=tmp_path)
    found = loader.get_model()
    image, transformer = (
        replace(TINY.image, encoder=False, codebook=0.25, commitment=1.0),
        replace(TINY.transformer, start=17),
    )
    assert found.config == replace(TINY, image=image, transformer=transformer)
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    assert loader.get_tokenizer().vocab_size == len([*SPECIALS, *ALPHABET]) + (3 if "mini" in name else 5)


def test_the_sources_two_files_are_read_as_one(tmp_path):
    for name in ("flax_model.msgpack", "vqgan.msgpack"):
        array = msgpack.ExtType(1, msgpack.packb(((1,), "float32", bytes(4))))
        (tmp_path / name).write_bytes(msgpack.packb({"decoder": {"bias": array}}))
    for name in ("dalle-bart", "dalle-mini", "dalle-mega"):
        state = read_parts(next(card for card in CARDS if card.name == name), tmp_path)
        assert set(state) == {"decoder/bias", "vqgan.decoder/bias"}


def test_weights_of_another_size_than_the_card_are_refused(tmp_path):
    weights.write(dalle_mini(TINY).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(TINY)))
    with pytest.raises(WeightsMismatch, match="is not dalle-mini"):
        AutoLoader(TASK, "dalle-mini", weights=tmp_path).get_model()


def test_a_config_of_another_version_is_refused():
    with pytest.raises(WeightsMismatch, match="config is not one of a DALL-E mini"):
        CARDS[0].build({"layers": 3})


# --- vocabularies ---
def test_a_vocabulary_is_needed_and_must_not_have_more_ids_than_the_weights(tmp_path):
    config = dataclasses.asdict(TINY)
    with pytest.raises(DataError, match="vocab.json and merges.txt"):
        CARDS[0].tokenizer(config, {})
    put_vocabulary(tmp_path, more=100)
    with pytest.raises(WeightsMismatch, match="360 ids and the weights 300"):
        CARDS[0].tokenizer(config, {path.name: path for path in tmp_path.iterdir()})
