from __future__ import annotations

import dataclasses
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from zoo import AutoLoader, catalog, weights
from zoo.catalog.dalle import CARDS
from zoo.converters.dalle import MIN_DALLE, RU_DALLE, Layout
from zoo.errors import WeightsMismatch
from zoo.models.dalle import Dalle, DalleConfig
from zoo.models.dalle_transformer import TransformerConfig
from zoo.models.dvae import DvaeConfig
from zoo.models.vqgan import VqganConfig

SIZED = [card for card in CARDS if card.config and not card.trained]
NAMED = {card.name: card for card in CARDS}
PUBLISHED = {"mindalle-1.3b": MIN_DALLE, "rudalle-malevich": RU_DALLE}
TASK = "text2img"
DVAE = 97_616_006  # OpenAI's, in the sizes to train
VQGAN = VqganConfig(size=16, widths=(32, 32), blocks=1, attention=(), latent=8, vocab=12, code_width=8)
SIZES = TransformerConfig(text_vocab=20, text_length=6, vocab=12, grid=8, width=16, depth=3, heads=2)
every_sized_card = pytest.mark.parametrize("card", SIZED, ids=lambda card: card.name)
every_published_card = pytest.mark.parametrize("name", PUBLISHED)


def on_meta(card) -> Dalle:
    with torch.device("meta"):
        return card.build(card.config)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- sizes ---
@every_sized_card
def test_the_network_of_a_card_has_its_parameters_and_what_its_config_says(card):
    model = on_meta(card)
    assert count(model) == card.params
    made = dataclasses.asdict(model.config)
    assert made["image"] == card.config["image"]
    assert made["transformer"].items() >= card.config["transformer"].items()
    assert made["caption_dropout"] == (0.0 if card.files else 0.1)


@pytest.mark.parametrize("name,billions", [("1.3b", 1.323), ("2.8b", 2.928), ("5.6b", 5.685), ("12b", 12.293)])
def test_the_papers_sizes_have_the_papers_parameters(name, billions):
    """12 D^2 of each layer, as the paper counts, and the embeddings and output layers."""
    model = on_meta(NAMED[f"dalle-{name}"])
    sizes = model.transformer.config
    whole = count(model.transformer)
    assert whole / 1e9 == pytest.approx(billions, abs=5e-4) and count(model.dvae) == DVAE
    outside = (2 * (sizes.text_vocab + sizes.vocab) + 2 * sizes.text_length + 2 * sizes.grid) * sizes.width
    assert whole == pytest.approx(12 * sizes.width**2 * sizes.depth + outside, rel=1e-3)
    assert sizes.width // sizes.heads == 64


def test_the_published_counts():
    """Of minDALL-E, 1,291,081,728. Of ruDALL-E 1,310,410,880, less what is left out: the outputs of 128 paddings with
    their biases, and a row of positions."""
    counts = {name: count(on_meta(NAMED[name]).transformer) for name in PUBLISHED}
    assert counts == {"mindalle-1.3b": 1_291_081_728, "rudalle-malevich": 1_310_410_880 - 128 * (2048 + 1) - 2048}


@every_sized_card
def test_pictures_become_as_large_as_the_card_says(card):
    image = card.transform(card.config)(Image.new("RGB", (300, 200), (255, 0, 128)))
    assert image.shape == (3, 256, 256)
    assert image.mean((1, 2)).tolist() == pytest.approx([1, 0, 128 / 255])


def test_what_is_not_free_for_commerce_says_so():
    assert [card.name for card in CARDS if not card.commercial] == ["mindalle-1.3b"]
    assert NAMED["mindalle-1.3b"].licence.startswith("CC-BY-NC-SA-4.0")


# --- published layouts ---
def theirs(state: dict[str, Tensor], layout: Layout) -> dict[str, dict[str, Tensor]]:
    """Our state -> the files of a source, by the converter's tables, which its own tests hold against the source."""
    pictures = {name.removeprefix("dvae."): t for name, t in state.items() if name.startswith("dvae.")}
    ours = {name.removeprefix("transformer."): t for name, t in state.items() if name.startswith("transformer.")}
    words = {}
    for name, names in layout.pairs(1 + max(int(n.split(".")[1]) for n in ours if n.startswith("blocks."))):
        words |= dict(zip(names, ours.pop(name).chunk(len(names)), strict=True))
    if layout is RU_DALLE:
        length = len(words["text_pos_embeddings.weight"])
        words["text_pos_embeddings.weight"] = with_rows(words["text_pos_embeddings.weight"], 1)
        for kind in ("weight", "bias"):
            heads = ours.pop(f"text_head.{kind}"), ours.pop(f"image_head.{kind}")
            words[f"to_logits.1.{kind}"] = torch.cat([with_rows(heads[0], length), heads[1]])
    assert not ours
    return {"words": words, "pictures": pictures}


def with_rows(table: Tensor, more: int) -> Tensor:
    return torch.cat([table, table.new_zeros(more, *table.shape[1:])])


@every_published_card
def test_the_published_layout_of_a_cards_size_gives_its_config(name):
    card, layout = NAMED[name], PUBLISHED[name]
    files = theirs(on_meta(card).state_dict(), layout)
    state = {prefix + n: t for prefix, part in (("", "words"), ("vqgan.", "pictures")) for n, t in files[part].items()}
    found = card.convert(state, card.config)[1]
    assert found == dataclasses.asdict(DalleConfig.from_dict(card.config))
    half = 2 if layout is RU_DALLE else 4
    masks = 3 * (128 + 1024) ** 2 if layout is RU_DALLE else 0
    assert card.files[0].size == sum(t.numel() for t in files["words"].values()) * half + masks
    assert card.files[1].size > 0.99 * 4 * sum(t.numel() for t in files["pictures"].values())
    assert [file.name for file in card.files[:2]] == list(card.parts)


def tiny(name: str) -> DalleConfig:
    card = NAMED[name]
    fixed = {field: card.config["transformer"][field] for field in PUBLISHED[name].fixed}
    image = replace(VQGAN, quantizer=card.config["image"]["quantizer"])
    said = {field: card.config[field] for field in ("caption_dropout", "empty") if field in card.config}
    return DalleConfig(image=image, transformer=replace(SIZES, **fixed), **said)


def put(name: str, folder: Path) -> Dalle:
    """The files of a tiny model of the card's kind."""
    torch.manual_seed(0)
    model = Dalle(tiny(name)).eval()
    for part, tensors in zip(NAMED[name].parts, theirs(model.state_dict(), PUBLISHED[name]).values(), strict=True):
        wrapped = part.endswith(".ckpt")
        tensors = {n: tensor.clone() for n, tensor in tensors.items()}
        torch.save({"state_dict": tensors} if wrapped else tensors, folder / part)
    if name == "mindalle-1.3b":
        (folder / "tokenizer").mkdir()
        pieces = ["[PAD]", "[UNK]", "c", "a", "t", "t</w>", "ca", "cat</w>"]
        (folder / "tokenizer/bpe-16k-vocab.json").write_text(json.dumps({p: id for id, p in enumerate(pieces)}))
        (folder / "tokenizer/bpe-16k-merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    else:
        (folder / "bpe.model").write_text("4 1\n9601 4\n1082 5\n1086 6\n1090 7\n5 6 8\n1 0 2 3\n")
    return model


@every_published_card
def test_published_files_in_the_models_folder_load_and_draw(name, tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "CARDS", [replace(NAMED[name], config=dataclasses.asdict(tiny(name)))])
    (tmp_path / name).mkdir()
    model = put(name, tmp_path / name)
    found = AutoLoader(TASK, name, model_dir=tmp_path).get_model()
    assert found.config == model.config
    state = model.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in found.state_dict().items())
    text, expected = {
        "mindalle-1.3b": ("Cat", [7, 0, 0, 0, 0, 0]),
        "rudalle-malevich": ("Кот", [2, 4, 8, 7, 3, 0]),
    }[name]
    assert found.tokenizer.tokenize_as_tensor(text).tolist() == [expected]
    assert torch.equal(found.tokenizer.tokenize_as_tensor(""), found.no_caption(torch.zeros(1, 6, dtype=torch.int64)))
    model.tokenizer = found.tokenizer
    drawn = found.generate([text, ""], n=2, seed=3, progress=False)
    assert drawn == model.generate([text, ""], n=2, seed=3, progress=False)
    assert drawn[0][0].size == (16, 16)


@every_published_card
def test_a_tokenizer_of_more_ids_than_the_weights_is_refused(name, tmp_path):
    put(name, tmp_path)
    config = dataclasses.asdict(replace(tiny(name), transformer=replace(tiny(name).transformer, text_vocab=7)))
    files = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(WeightsMismatch, match=r"has \d ids and the weights 7"):
        NAMED[name].tokenizer(config, files)


def test_min_dalles_archive_is_read_without_being_unpacked_by_hand(tmp_path, monkeypatch):
    card = replace(NAMED["mindalle-1.3b"], config=dataclasses.asdict(tiny("mindalle-1.3b")))
    monkeypatch.setattr(catalog, "CARDS", [card])
    unpacked, folder = tmp_path / "1.3B", tmp_path / card.name
    unpacked.mkdir(), folder.mkdir()
    model = put(card.name, unpacked)
    (unpacked / "config.yaml").write_text("not asked for")
    with tarfile.open(folder / "1.3B.tar.gz", "w:gz") as tar:
        tar.add(unpacked, "./1.3B")
    for words in ({"model_dir": tmp_path}, {"weights": unpacked}):
        found = AutoLoader(TASK, card.name, **words).get_model()
        assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in found.state_dict().items())
        assert found.tokenizer.encode("cat") == [7]
    held = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and ".zoo" not in path.parts}
    assert held == {"1.3B.tar.gz", *(file.name for file in card.files)}


# --- zoo's own ---
@pytest.mark.parametrize("image", [VQGAN, DvaeConfig(size=64, vocab=12, hidden=8, stem=8, blocks=1)])
def test_zoos_own_weights_are_loaded_by_the_familys_name_whatever_their_image_tokenizer(image, tmp_path):
    config = DalleConfig(image=image, transformer=SIZES, caption_dropout=0.2, empty=(3,), guidance=2.0)
    model = Dalle(config)
    weights.write(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    card = NAMED["dalle"]
    state, sizes = card.convert(weights.read(tmp_path), weights.read_config(tmp_path))
    assert sizes == dataclasses.asdict(config)
    found = weights.load(card.build(sizes), state)
    assert found.config == config and type(found.dvae) is type(model.dvae)
    with pytest.raises(WeightsMismatch, match="config.json"):
        card.convert(state, {})


def test_a_config_of_another_version_is_refused():
    with pytest.raises(WeightsMismatch, match="config is not one of a DALL-E"):
        CARDS[0].build({"layers": 3})
