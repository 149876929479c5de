from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from PIL import Image

from zoo import AutoLoader, catalog, hub, weights
from zoo.catalog import alt_diffusion, kl_vae, latent_diffusion, stable_diffusion
from zoo.errors import DataError, DownloadError, WeightsMismatch
from zoo.models.clip import TextConfig
from zoo.models.kl_vae import KlVae, KlVaeConfig
from zoo.models.stable_diffusion import StableDiffusion, StableDiffusionConfig
from zoo.models.text_encoder import BertTextConfig
from zoo.models.unet import UNetConfig

TASK = "text2img"
CARDS = stable_diffusion.CARDS + latent_diffusion.CARDS + alt_diffusion.CARDS + kl_vae.CARDS
SIZED = [card for card in CARDS if card.config]
every_sized_card = pytest.mark.parametrize("card", SIZED, ids=lambda card: card.name)
TINY = StableDiffusionConfig(
    text=TextConfig(context=12, vocab=516, width=32, depth=2, heads=4),
    unet=UNetConfig(widths=(32, 64), blocks=1, attention=(0,), heads=(4, 4), context=32, size=8),
    vae=KlVaeConfig(size=16, widths=(32, 64), blocks=1),
    start=514,
    end=515,
    pad=515,
    window=12,
)


@pytest.fixture(autouse=True)
def _listed(monkeypatch):
    monkeypatch.setattr(catalog, "CARDS", CARDS)


NETWORKS: dict[str, torch.nn.Module] = {}  # by config: many cards are of one size


def network(card: catalog.Card) -> torch.nn.Module:
    key = json.dumps([card.family, card.config])
    if key not in NETWORKS:
        with torch.device("meta"):
            NETWORKS[key] = card.build(card.config)
    return NETWORKS[key]


def written(model: StableDiffusion, folder) -> None:
    """As the trainer leaves it."""
    folder.mkdir(exist_ok=True)
    weights.write(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(model.config)))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nab c</w>\n")


# --- rows ------------------------------------------------------------------------------------------------------------
@every_sized_card
def test_the_network_of_a_card_has_its_parameters_and_its_sizes(card):
    model = network(card)
    assert sum(parameter.numel() for parameter in model.parameters()) == card.params
    sizes = dataclasses.asdict(model.config)
    assert {name: sizes[name] for name in card.config} == dict(card.config)


@every_sized_card
def test_what_is_loaded_agrees_with_its_card(card):
    """In the layout of the folders on the hub, whose tensors are those of our own export; latent diffusion's in that of
    CompVis's file."""
    model = network(card)
    state, config = model.state_dict(), dataclasses.asdict(model.config)
    if card in latent_diffusion.CARDS and card.files:
        from zoo.converters.stable_diffusion import to_compvis

        with torch.device("meta"):
            theirs = to_compvis(state, config)
        said = ("betas", "alphas_cumprod")  # the card's, since these have no numbers
        state, config = {name: tensor for name, tensor in theirs.items() if name not in said}, card.config
    elif card.task == TASK and card.files:  # those to train have no layout but ours
        from zoo.converters.stable_diffusion import to_diffusers

        parts = to_diffusers(state, config)
        theirs = {f"{n}.{k}": t for n in ("unet", "vae", "text_encoder") for k, t in parts[n][0].items()}
        state, config = theirs, {**card.config, "diffusers": {n: parts[n][1] for n in ("unet", "vae", "text_encoder")}}
    found, sizes = card.convert(state, config)
    assert found.keys() == model.state_dict().keys()
    assert {name: sizes[name] for name in card.config} == dict(card.config)


@every_sized_card
def test_files_are_as_large_as_their_tensors_or_larger(card):
    for file in card.files if card.task != TASK else card.alternatives:
        assert file.size is None or file.size > 1.9 * card.params


@every_sized_card
def test_pictures_are_as_large_as_those_it_was_trained_on(card):
    image = card.transform(card.config)(Image.new("RGB", (90, 60), (255, 0, 128)))
    assert image.shape == (3, network(card).image_size, network(card).image_size)
    assert image.mean((1, 2)).tolist() == pytest.approx([1, 0, 128 / 255])


def test_unets_and_towers_have_the_published_numbers_of_tensors_and_parameters():
    """Table of the papers' repositories: 686, 248 and 196 tensors; of version 2 fewer, since ours join q, k and v."""
    models = {card.name: network(card) for card in SIZED if card.task == TASK}

    def facts(name: str, part: str) -> tuple[int, int]:
        state = getattr(models[name], part).state_dict()
        return len(state), sum(tensor.numel() for tensor in state.values())

    assert facts("stable-diffusion-v1-5", "unet") == (686, 859_520_964)
    assert facts("stable-diffusion-inpainting-v1-5", "unet") == (686, 859_535_364)
    assert facts("stable-diffusion-2-1", "unet") == (686, 865_910_724)
    assert facts("stable-diffusion-v1-4", "vae") == (248, 83_653_863)
    assert facts("stable-diffusion-v1-5", "text")[1] == 123_060_480
    assert facts("stable-diffusion-2-base", "text")[1] == 340_387_840
    assert facts("ldm-text2img-256", "unet")[1] == 403_623_939 and facts("ldm-text2img-256", "vae") == (205, 55_322_782)
    assert facts("ldm-text2im-large-256", "unet") == (686, 872_300_484)
    assert facts("tiny-sd", "unet")[1] == 323_384_964 and facts("small-sd", "unet")[1] == 579_384_964


def test_what_no_weights_say_is_on_the_cards():
    said = {
        card.name: (card.config["noise"]["prediction"], card.config["pad"], card.config["unet"]["upcast"])
        for card in SIZED
        if card.task == TASK
    }
    assert {name for name, (prediction, _, _) in said.items() if prediction == "v"} == {"stable-diffusion-2-1"}
    assert {name for name, (_, _, upcast) in said.items() if upcast} == {"stable-diffusion-2-1"}
    second = {"stable-diffusion-2-base", "stable-diffusion-2-1-base", "stable-diffusion-2-1"}
    assert {name for name, (_, pad, _) in said.items() if pad == 0} == {
        *second,
        *("taiyi-stable-diffusion-1b-chinese-v0.1", "ldm-text2img-256", "ldm-text2im-large-256"),
    }
    assert said["stable-diffusion-v1-5"] == ("epsilon", 49407, False)
    sides = {card.name: network(card).image_size for card in SIZED if card.task == TASK}
    assert (sides["stable-diffusion-v1-5"], sides["stable-diffusion-2-1"]) == (512, 768)


# --- by name ---------------------------------------------------------------------------------------------------------
def test_a_model_of_any_size_is_loaded_by_the_familys_name(tmp_path):
    torch.manual_seed(0)
    model = StableDiffusion(TINY).eval()
    written(model, tmp_path)
    loader = AutoLoader(TASK, "stable-diffusion", weights=tmp_path)
    found = loader.get_model()
    assert found.config == TINY
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert loader.get_transform()(Image.new("RGB", (20, 30))).shape == (3, 16, 16)
    assert found.tokenizer.tokenize_as_tensor(["abc"]).tolist() == [[514, 513, 515] + [515] * 9]


def test_weights_of_another_model_than_the_card_are_refused(tmp_path):
    written(StableDiffusion(TINY), tmp_path)
    with pytest.raises(WeightsMismatch, match=r"is not stable-diffusion-v1-5: text.context is 12"):
        AutoLoader(TASK, "stable-diffusion-v1-5", weights=tmp_path).get_model()


def test_a_vocabulary_of_other_ids_is_refused(tmp_path):
    written(StableDiffusion(TINY), tmp_path)
    loader = AutoLoader(TASK, "stable-diffusion", weights=tmp_path)
    (tmp_path / "merges.txt").unlink()
    with pytest.raises(WeightsMismatch, match="the tokenizer has 49408 ids.*the weights have 516"):
        loader.get_tokenizer()
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(WeightsMismatch, match="the tokenizer has 515 ids"):
        loader.get_tokenizer()


def test_a_tokenizer_json_must_be_openais_since_it_is_not_read(tmp_path):
    from zoo.tokenizers import ClipTokenizer

    (tmp_path / "tokenizer").mkdir()
    path = tmp_path / "tokenizer" / "tokenizer.json"
    config, files = {**stable_diffusion.V1}, {"tokenizer/tokenizer.json": path}
    path.write_text(json.dumps({"model": {"vocab": ClipTokenizer().encoder}}))
    assert stable_diffusion.tokenizer(config, files).pad == 49407
    path.write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    with pytest.raises(DataError, match="another vocabulary than OpenAI's"):
        stable_diffusion.tokenizer(config, files)


def test_the_tower_of_taiyi_has_berts_tokenizer_and_says_what_it_needs(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "猫", "狗"]))
    text = dataclasses.asdict(BertTextConfig(vocab=7, positions=20, context=10, masked=False))
    config = {"text": text, "start": 2, "end": 3, "pad": 0, "window": 10}
    with pytest.raises(DataError, match="needs tokenizer/vocab.txt"):
        stable_diffusion.tokenizer(config, {})
    found = stable_diffusion.tokenizer(config, {"tokenizer/vocab.txt": tmp_path / "vocab.txt"})
    assert found.tokenize_as_tensor(["狗猫"]).tolist() == [[2, 6, 5, 3] + [0] * 6]
    assert found.encode("狗猫") == [6, 5]
    with pytest.raises(WeightsMismatch, match="'start': 2"):
        stable_diffusion.tokenizer(config | {"start": 101}, {"tokenizer/vocab.txt": tmp_path / "vocab.txt"})


def test_latent_diffusion_draws_as_published_and_has_berts_vocabulary_from_elsewhere(tmp_path, monkeypatch):
    """README: 100 steps of DDIM of the figure of Conceptual Captions; --scale 5.0 --ddim_steps 50 for the large one."""
    said = {card.name: card.config for card in latent_diffusion.CARDS}
    drawing = {name: tuple(said[name].get(word) for word in ("sampler", "steps", "guidance")) for name in said}
    assert drawing["ldm-text2img-256"] == ("ddim", 100, 1.0) and drawing["ldm-text2im-large-256"] == ("ddim", 50, 5.0)
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    for name, file in (("ldm-text2img-256", "vocab.txt"), ("ldm-text2im-large-256", "tokenizer/vocab.txt")):
        path = tmp_path / name / file
        path.parent.mkdir(parents=True)
        path.write_text("\n".join([special.get(id, f"[unused{id}]") for id in range(104)] + ["red", "apple"]))
        asked = fetching(monkeypatch, tmp_path / name)
        tokenizer = AutoLoader(TASK, name, model_dir=tmp_path / "models", device="cpu").get_tokenizer()
        assert asked == [file]
        assert tokenizer.tokenize_as_tensor(["Red apple"]).tolist() == [[101, 104, 105, 102] + [0] * 73]


# --- downloads -------------------------------------------------------------------------------------------------------
def fetching(monkeypatch, folder, gone: tuple[str, ...] = ()) -> list[str]:
    """A hub that has the files of TINY, but for those that are gone."""
    asked: list[str] = []

    def fetch(file, target):
        asked.append(file.name)
        if file.name in gone or not (folder / file.name).is_file():
            raise DownloadError(f"{file.name} is gone")
        (target / file.name).parent.mkdir(parents=True, exist_ok=True)
        (target / file.name).write_bytes((folder / file.name).read_bytes())
        return target / file.name

    monkeypatch.setattr(hub, "fetch", fetch)
    return asked


def tiny_card(monkeypatch) -> catalog.Card:
    original = catalog.find(TASK, "stable-diffusion-v1-5")
    card = dataclasses.replace(original, name="tiny", config=dataclasses.asdict(TINY))
    monkeypatch.setattr(catalog, "CARDS", (card,))
    monkeypatch.setattr(stable_diffusion, "_clip", lambda config, files: TinyTokenizer())
    return card


class TinyTokenizer:
    start_token, end_token, pad, vocab_size = 514, 515, 515, 516


def test_the_parts_of_a_folder_are_brought_and_read_together(tmp_path, monkeypatch):
    from zoo.commands.export import save_diffusers

    torch.manual_seed(0)
    model = StableDiffusion(TINY).eval()
    save_diffusers(model, tmp_path / "hub")
    card = tiny_card(monkeypatch)
    asked = fetching(monkeypatch, tmp_path / "hub")
    found = AutoLoader(TASK, "tiny", model_dir=tmp_path / "models", device="cpu").get_model()
    assert asked == [file.name for file in card.files]
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_the_single_file_takes_the_place_of_a_folder_that_is_gone(tmp_path, monkeypatch):
    from zoo.converters.stable_diffusion import to_compvis

    torch.manual_seed(0)
    model = StableDiffusion(TINY).eval()
    card = tiny_card(monkeypatch)
    (tmp_path / "hub").mkdir()
    file = to_compvis(model.state_dict(), dataclasses.asdict(TINY))
    weights.write(file, tmp_path / "hub" / card.alternatives[0].name)
    asked = fetching(monkeypatch, tmp_path / "hub", gone=(card.files[0].name,))
    found = AutoLoader(TASK, "tiny", model_dir=tmp_path / "models", device="cpu").get_model()
    assert asked == [card.files[0].name, "v1-5-pruned-emaonly.safetensors"]
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_the_packaged_autoencoder_is_loaded_and_draws_what_it_sees():
    loader = AutoLoader("img_tokenizing", "kl-vae-emoji-tiny", device="cpu")
    model = loader.get_model()
    assert isinstance(model, KlVae)
    image = loader.get_transform()(Image.new("RGB", (70, 70), (255, 200, 0)))[None]
    with torch.inference_mode():
        latents = model.encode(image)
        drawn = model.decode(latents)
    assert latents.shape == (1, 4, 16, 16) and drawn.shape == image.shape
    assert (drawn - image).abs().mean() < 0.1
