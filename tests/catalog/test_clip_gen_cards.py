from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from zoo import AutoLoader, catalog, weights
from zoo.catalog.clip_gen import CARDS
from zoo.converters.clip import to_openai
from zoo.errors import WeightsMismatch
from zoo.models.clip import ClipConfig, TextConfig, VitConfig
from zoo.models.clip_gen import ClipGen, ClipGenConfig
from zoo.models.clip_gen_transformer import ClipGenTransformerConfig
from zoo.models.vqgan import VqganConfig

NAMED = {card.name: card for card in CARDS}
SIZED = [card for card in CARDS if card.config]
FILES = ["gpt_coco.pt", "clip_vit_b32.pt", "vqgan_coco.pt"]
TINY = ClipGenConfig(
    clip=ClipConfig(
        embed=6,
        image=VitConfig(size=8, patch=4, width=64, depth=1, heads=1),
        text=TextConfig(vocab=49408, width=64, depth=1, heads=1),
    ),
    image=VqganConfig(
        size=8, widths=(32, 32), blocks=1, attention=(), latent=6, vocab=12, code_width=6, codebook=0.25, commitment=1.0
    ),
    transformer=ClipGenTransformerConfig(embed=6, vocab=12, grid=4, width=64, depth=2, heads=1, dropout=0.1),
)
every_sized_card = pytest.mark.parametrize("card", SIZED, ids=lambda card: card.name)


def on_meta(card) -> ClipGen:
    with torch.device("meta"):
        return card.build(card.config)


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# --- sizes ---
@every_sized_card
def test_the_network_of_a_card_has_its_parameters_and_is_of_the_released_sizes(card):
    model = on_meta(card)
    assert count(model) == card.params
    assert (count(model.clip), count(model.vqgan)) == (151_277_313, 76_073_859)
    assert count(model.transformer) == (751_334_144 if card.name == "clip-gen-large" else 336_669_696)
    sizes = model.transformer.config
    assert sizes.width // sizes.heads == 64 and (model.image_size, model.vqgan.grid, model.vqgan.vocab) == (
        *(256, 16),
        16384,
    )
    assert model.vqgan.config.eps == 1e-5 and model.clip.config.image.activation == "quick_gelu"


def test_the_release_is_three_files_and_their_tensors():
    card = NAMED["clip-gen-coco"]
    assert [file.name for file in card.files] == list(card.parts) == FILES
    assert all(file.url.endswith(f"HFAiLab/clip-gen/releases/download/v0.1.0/{file.name}") for file in card.files)
    assert card.licence.startswith("MIT")
    assert len(on_meta(card).transformer.state_dict()) == 296  # 320 of the release without 24 masks


@every_sized_card
def test_pictures_become_as_large_as_the_card_says(card):
    image = card.transform(card.config)(Image.new("RGB", (300, 200), (255, 0, 128)))
    assert image.shape == (3, 256, 256)
    assert image.mean((1, 2)).tolist() == pytest.approx([1, 0, 128 / 255])


# --- the release's layout ---
def gpt(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our transformer's tensors in the release's names."""
    names = {"context": "cond_proj", "image": "tok_emb", "norm": "norm", "image_head": "head"}
    layers = {"qkv": "self_attn.in_proj", "out": "self_attn.out_proj", "mlp.up": "linear1", "mlp.down": "linear2"}
    layers |= {"norm1": "norm1", "norm2": "norm2"}
    theirs = {"pos_emb": state.pop("positions.weight")[None]}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        if module.startswith("blocks."):
            number, layer = module.split(".", 2)[1:]
            joint = "_" if layer == "qkv" else "."
            theirs[f"blocks.{number}.encoder.{layers[layer]}{joint}{kind}"] = tensor
            theirs[f"blocks.{number}.mask"] = torch.ones(len(theirs["pos_emb"][0]), 1).bool()
        else:
            theirs[f"{names[module]}.{kind}"] = tensor
    return theirs


def of(part: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): t.clone() for name, t in state.items() if name.startswith(f"{part}.")}


def put(folder: Path) -> ClipGen:
    """The three files of a tiny release; its VQGAN in taming's names, since the other ones have their own tests."""
    torch.manual_seed(0)
    model = ClipGen(TINY).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    state = model.state_dict()
    torch.save({"model": gpt(of("transformer", state)), "epoch": 3}, folder / "gpt_coco.pt")
    torch.save(to_openai(of("clip", state), dataclasses.asdict(TINY.clip)), folder / "clip_vit_b32.pt")
    torch.save({"model": of("vqgan", state), "epoch": 3}, folder / "vqgan_coco.pt")
    return model


def same(found: ClipGen, model: ClipGen) -> bool:
    ours, theirs = found.state_dict(), model.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_releases_files_in_the_models_folder_load_and_draw(tmp_path, monkeypatch):
    name = "clip-gen-coco"
    monkeypatch.setattr(catalog, "CARDS", [replace(NAMED[name], config=dataclasses.asdict(TINY))])
    (tmp_path / name).mkdir()
    model = put(tmp_path / name)
    for words in ({"model_dir": tmp_path}, {"weights": tmp_path / name}, {"weights": tmp_path / name / FILES[2]}):
        loader = AutoLoader("text2img", name, device="cpu", **words)
        found = loader.get_model()
        assert found.config == TINY and same(found, model)
    assert found.tokenizer.tokenize_as_tensor("cat")[0, :4].tolist() == [49406, 2368, 49407, 0]
    model.tokenizer = found.tokenizer
    words = {"n": 2, "candidates": 4, "top_k": 5, "top_p": 0.95, "seed": 3, "progress": False}
    drawn = found.generate(["a cat", "a dog"], rerank=found.score, **words)
    assert drawn == model.generate(["a cat", "a dog"], rerank=model.score, **words)
    assert drawn[0][0].size == (8, 8)


def test_files_of_another_size_than_the_cards_are_refused(tmp_path):
    put(tmp_path)
    with pytest.raises(WeightsMismatch, match="two different models: embed is 6 by the shapes"):
        AutoLoader("text2img", "clip-gen-coco", weights=tmp_path, device="cpu").get_model()


def test_the_familys_name_loads_a_release_of_any_size(tmp_path):
    model = put(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"image": {"size": 8}}))
    found = AutoLoader("text2img", "clip-gen", weights=tmp_path, device="cpu").get_model()
    assert same(found, model)
    assert found.config == replace(TINY, transformer=replace(TINY.transformer, dropout=0.0))


# --- zoo's own ---
def test_zoos_own_weights_are_loaded_by_the_familys_name(tmp_path):
    config = replace(TINY, image=replace(TINY.image, quantizer="cosine", decay=0.9), condition_dropout=0.1, noise=0.5)
    model = ClipGen(config)
    weights.write(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    found = AutoLoader("text2img", "clip-gen", weights=tmp_path, device="cpu").get_model()
    assert found.config == config and same(found, model)
    (tmp_path / "config.json").unlink()
    with pytest.raises(WeightsMismatch, match="config.json"):
        AutoLoader("text2img", "clip-gen", weights=tmp_path, device="cpu").get_model()


def test_a_config_of_another_version_is_refused():
    with pytest.raises(WeightsMismatch, match="config is not one of a CLIP-GEN"):
        CARDS[0].build({"layers": 3})
