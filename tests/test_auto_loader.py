from __future__ import annotations

import dataclasses
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from zoo import AutoLoader, catalog, hub, weights
from zoo.errors import (
    ChecksumError,
    DeviceNotFound,
    DownloadError,
    OfflineError,
    SettingsError,
    UnknownModel,
    UnknownTask,
    UnreadableWeights,
    WeightsMismatch,
)
from zoo.models.clip import Clip, ClipConfig, TextConfig, VitConfig
from zoo.models.clip_resnet import ResNetConfig

ROOT = Path(__file__).parent.parent
TASK = "txt_img_matching"
VOCAB = 516  # 256 bytes, 256 that end a word, two merges, start and end
TINY = ClipConfig(
    embed=16,
    image=VitConfig(size=16, patch=8, width=32, depth=2, heads=4, mlp_ratio=2.7, activation="gelu"),
    text=TextConfig(context=9, vocab=VOCAB, width=32, depth=2, heads=2, activation="gelu"),
    mean=(0.5, 0.5, 0.5),
    resize="squash",
)
CONFIGS = {
    "vit": TINY,
    "resnet": dataclasses.replace(TINY, image=ResNetConfig(size=32, layers=(1, 1, 1, 1), width=4)),
    "sigmoid": dataclasses.replace(TINY, loss="sigmoid"),
}


@pytest.fixture(autouse=True)
def _same_numbers_each_time():
    torch.manual_seed(0)


def save(model: Clip, folder: Path) -> Path:
    """A folder as the Trainer leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    weights.write(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(model.config)))
    (folder / "merges.txt.gz").write_bytes(gzip.compress(b"#version\na b\nab c</w>\n"))
    return folder


def tiny_card(monkeypatch, config: dict | None, **changes) -> catalog.Card:
    """A card for TINY, the only one there is."""
    card = dataclasses.replace(catalog.find(TASK, "clip"), name="tiny", config=config, **changes)
    monkeypatch.setattr(catalog, "CARDS", (card,))
    return card


# --- a folder of weights ---
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_trained_folder_gives_back_its_model_tokenizer_and_transform(config: ClipConfig, tmp_path):
    trained = Clip(config).eval()
    loader = AutoLoader(TASK, "clip", weights=save(trained, tmp_path), device="cpu")
    model = loader.get_model()
    assert model.config == config
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in trained.state_dict().items())
    tokens = loader.get_tokenizer().tokenize_as_tensor(["abc"])
    assert tokens.tolist() == [[514, 513, 515] + [0] * 6]
    image = loader.get_transform()(Image.new("RGB", (20, 30)))[None]
    assert image.shape[-2:] == (config.image.size, config.image.size)
    torch.testing.assert_close(model.similarity(image, tokens), trained.similarity(image, tokens))


def test_the_transform_of_a_folder_is_the_one_it_was_trained_with(tmp_path):
    transform = AutoLoader(TASK, "clip", weights=save(Clip(TINY), tmp_path)).get_transform()
    assert (transform.mean, transform.resize, transform.img_size) == ((0.5, 0.5, 0.5), "squash", 16)


def test_a_file_alone_finds_the_config_beside_it(tmp_path):
    save(Clip(TINY), tmp_path)
    assert AutoLoader(TASK, "clip", weights=tmp_path / "model.safetensors").get_model().config == TINY


def test_the_config_may_lie_inside_the_file(tmp_path):
    trained, path = Clip(TINY), tmp_path / "model.safetensors"
    weights.write(trained.state_dict(), path, metadata={"config": dataclasses.asdict(TINY)})
    assert AutoLoader(TASK, "clip", weights=path).get_model().config == TINY


def test_a_folder_without_its_vocabulary_says_so(tmp_path):
    (save(Clip(TINY), tmp_path) / "merges.txt.gz").unlink()
    with pytest.raises(WeightsMismatch, match="the weights have 516"):
        AutoLoader(TASK, "clip", weights=tmp_path).get_tokenizer()


def test_a_model_is_ready_for_inference_and_loaded_once(tmp_path):
    loader = AutoLoader(TASK, "clip", weights=save(Clip(TINY), tmp_path))
    model = loader.get_model()
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert loader.get_model() is model


def test_nothing_is_read_before_it_is_asked_for(tmp_path, monkeypatch):
    tiny_card(monkeypatch, dataclasses.asdict(TINY))
    folder = save(Clip(TINY), tmp_path)
    (folder / "model.safetensors").write_bytes(b"damaged")
    loader = AutoLoader(TASK, "tiny", weights=folder)
    loader.get_tokenizer(), loader.get_transform()
    with pytest.raises(UnreadableWeights):
        loader.get_model()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (None, torch.float32),
        ("bf16", torch.bfloat16),
        ("Float16", torch.float16),
        ("half", torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
)
def test_the_model_is_of_the_dtype_that_was_asked_for(dtype, expected, tmp_path):
    model = AutoLoader(TASK, "clip", weights=save(Clip(TINY), tmp_path), dtype=dtype).get_model()
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model.encode_image(torch.randn(1, 3, 16, 16)).dtype == expected


# --- a card against the weights ---
def test_weights_that_are_as_the_card_says_are_loaded(tmp_path, monkeypatch):
    tiny_card(monkeypatch, dataclasses.asdict(TINY))
    trained = Clip(TINY)
    save(trained, tmp_path)
    (tmp_path / "config.json").unlink()  # the card says what shapes cannot
    assert AutoLoader(TASK, "TINY", weights=tmp_path).get_model().config == TINY


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"image": {"activation": "quick_gelu"}}, "image.activation is 'gelu' in .* 'quick_gelu' on the card"),
        ({"text": {"heads": 4}}, "text.heads is 2 in .* 4 on the card"),
        ({"mean": (0.4, 0.5, 0.5)}, r"mean is \[0.5, 0.5, 0.5\] in .*0.4, 0.5, 0.5"),
        ({"image": {"depth": 3}}, "image.depth is 2 in .* 3 on the card"),
        ({"embed": 17}, "embed is 16 in .* 17 on the card"),
    ],
)
def test_a_config_that_contradicts_the_card_is_refused(other: dict, message: str, tmp_path, monkeypatch):
    says = dataclasses.asdict(TINY)
    for field, value in other.items():
        says[field] = says[field] | value if isinstance(value, dict) else value
    tiny_card(monkeypatch, says)
    with pytest.raises(WeightsMismatch, match=message):
        AutoLoader(TASK, "tiny", weights=save(Clip(TINY), tmp_path)).get_model()


def test_weights_of_another_size_than_the_card_are_refused(tmp_path):
    (save(Clip(TINY), tmp_path) / "config.json").unlink()
    with pytest.raises(WeightsMismatch, match="image.width is 32 by the shapes .* and 768 by .*the card"):
        AutoLoader(TASK, "clip-base-p32-224", weights=tmp_path).get_model()


def test_what_a_card_leaves_out_the_published_config_decides(tmp_path, monkeypatch):
    sizes = dataclasses.asdict(TINY)
    del sizes["image"]["activation"], sizes["image"]["heads"]
    tiny_card(monkeypatch, sizes)
    assert AutoLoader(TASK, "tiny", weights=save(Clip(TINY), tmp_path)).get_model().config == TINY


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    state = Clip(TINY).state_dict()
    del state["image.norm_out.weight"]
    save(Clip(TINY), tmp_path)
    weights.write(state, tmp_path / "model.safetensors")
    with pytest.raises(WeightsMismatch, match="missing: image.norm_out.weight"):
        AutoLoader(TASK, "clip", weights=tmp_path).get_model()


# --- at the door ---
def test_names_are_checked_at_once():
    with pytest.raises(UnknownTask, match="nearest: txt_img_matching"):
        AutoLoader("txt_image_matching", "clip-base-p32-224")
    with pytest.raises(UnknownModel, match="nearest: clip-base-p32-224"):
        AutoLoader(TASK, "clip-bse-p32-224")


def test_a_family_needs_weights():
    with pytest.raises(SettingsError, match="'clip' is a family .* pass weights="):
        AutoLoader(TASK, "clip")


def test_weights_that_are_not_there_are_refused_at_once(tmp_path):
    with pytest.raises(UnreadableWeights, match="nowhere.pt"):
        AutoLoader(TASK, "clip", weights=tmp_path / "nowhere.pt")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "tpu"])
def test_a_device_that_this_machine_lacks_is_refused_at_once(device: str):
    with pytest.raises(DeviceNotFound, match=f"{device}.*cpu"):
        AutoLoader(TASK, "clip-base-p32-224", device=device)


@pytest.mark.parametrize("dtype", ["bf61", torch.int8])
def test_a_dtype_that_does_not_exist_is_refused_at_once(dtype):
    with pytest.raises(SettingsError, match="bf16|float"):
        AutoLoader(TASK, "clip-base-p32-224", dtype=dtype)


def test_an_unknown_keyword_is_pythons_own_error():
    with pytest.raises(TypeError, match="only_download_config"):
        AutoLoader(TASK, "clip-base-p32-224", only_download_config=True)


def test_models_lie_in_a_folder_of_their_own_name_in_small_letters(tmp_path, monkeypatch):
    assert AutoLoader(TASK, "CLIP-base-p32-224", model_dir=tmp_path).folder == tmp_path / "clip-base-p32-224"
    monkeypatch.setenv("ZOO_HOME", str(tmp_path / "home"))
    assert AutoLoader(TASK, "clip-base-p32-224").folder == tmp_path / "home" / "clip-base-p32-224"
    assert not list(tmp_path.iterdir())


# --- downloads ---
@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A card of two sources; what the hub was asked for; and what each source answers, a path or an error."""
    trained = Clip(TINY)
    save(trained, tmp_path / "there")
    first, twin = hub.File(name="first.pt", url="https://a.invalid"), hub.File(name="twin.pt", url="https://b.invalid")
    tiny_card(monkeypatch, dataclasses.asdict(TINY), files=(first,), alternatives=(twin,))
    asked: list[str] = []
    answers: dict[str, object] = {
        "first.pt": DownloadError("gone"),
        "twin.pt": tmp_path / "there" / "model.safetensors",
    }

    def fetch(file, folder):
        asked.append(file.name)
        if isinstance(answers[file.name], Exception):
            raise answers[file.name]
        return answers[file.name]

    monkeypatch.setattr(hub, "fetch", fetch)
    return asked, answers


def test_the_twin_is_taken_when_the_first_source_is_gone(sources):
    asked, _ = sources
    assert AutoLoader(TASK, "tiny").get_model().config == TINY
    assert asked == ["first.pt", "twin.pt"]


def test_a_twin_that_is_here_comes_before_any_download(sources, tmp_path):
    asked, _ = sources
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "twin.pt").touch()
    AutoLoader(TASK, "tiny", model_dir=tmp_path).get_model()
    assert asked == ["twin.pt"]


@pytest.mark.parametrize("error", [ChecksumError("forged"), OfflineError("offline")])
def test_a_forged_file_or_a_forbidden_network_is_not_passed_over(sources, error):
    asked, answers = sources
    answers["first.pt"] = error
    with pytest.raises(type(error)):
        AutoLoader(TASK, "tiny").get_model()
    assert asked == ["first.pt"]


def test_when_all_sources_fail_each_says_why(sources):
    _, answers = sources
    answers["twin.pt"] = DownloadError("refused")
    with pytest.raises(DownloadError, match="gone\nrefused"):
        AutoLoader(TASK, "tiny").get_model()


def test_weights_of_ones_own_are_never_downloaded(sources, tmp_path):
    asked, _ = sources
    AutoLoader(TASK, "tiny", weights=tmp_path / "there").get_model()
    assert asked == []


# --- weights in several files ---
@pytest.fixture
def in_parts(tmp_path, monkeypatch):
    """A card whose weights are two files, and the folder where they lie."""
    trained, folder = Clip(TINY), tmp_path / "parts"
    save(trained, folder)
    (folder / "model.safetensors").unlink()
    for tower in ("image", "text"):
        part = {n.removeprefix(f"{tower}."): t for n, t in trained.state_dict().items() if n.startswith(tower)}
        rest = {n: t for n, t in trained.state_dict().items() if not n.startswith(("image.", "text."))}
        torch.save(part if tower == "text" else {"image": part} | rest, folder / f"{tower}.pt")
    files = tuple(hub.File(name=f"{name}", url=f"https://{name}.invalid") for name in ("image.pt", "text.pt"))
    tokenizer = hub.File(name="merges.txt.gz", url="https://merges.invalid")
    parts = {"image.pt": "", "text.pt": "text."}
    tiny_card(monkeypatch, dataclasses.asdict(TINY), files=(*files, tokenizer), parts=parts)
    return trained, folder


@pytest.mark.parametrize("named", ["", "image.pt", "text.pt"])
def test_parts_are_read_as_one_from_their_folder_or_by_the_name_of_one(in_parts, named):
    trained, folder = in_parts
    state = AutoLoader(TASK, "tiny", weights=folder / named).get_model().state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in trained.state_dict().items())


def test_a_folder_with_all_in_one_file_is_read_by_a_card_of_parts_too(in_parts, tmp_path):
    trained, _ = in_parts
    model = AutoLoader(TASK, "tiny", weights=save(trained, tmp_path / "one")).get_model()
    assert torch.equal(model.text.positions, trained.text.positions)


def test_all_parts_are_fetched_and_are_no_files_of_the_tokenizer(in_parts, monkeypatch):
    _, folder = in_parts
    asked = []
    monkeypatch.setattr(hub, "fetch", lambda file, _: asked.append(file.name) or folder / file.name)
    loader = AutoLoader(TASK, "tiny")
    loader.get_model()
    assert asked == ["image.pt", "text.pt"]
    loader.get_tokenizer()
    assert asked[2:] == ["merges.txt.gz"]


def test_a_part_alone_lacks_the_others(in_parts):
    _, folder = in_parts
    (folder / "text.pt").unlink()
    with pytest.raises(WeightsMismatch):
        AutoLoader(TASK, "tiny", weights=folder).get_model()


def test_parts_that_hold_the_same_tensor_are_refused(in_parts):
    _, folder = in_parts
    torch.save({"embed": {"weight": torch.zeros(1)}, "text": {"positions": torch.zeros(1)}}, folder / "image.pt")
    with pytest.raises(UnreadableWeights, match="text.pt and a file beside it both hold text.positions"):
        AutoLoader(TASK, "tiny", weights=folder).get_model()


def test_the_packaged_model_matches_pictures_and_words():
    loader = AutoLoader(TASK, "clip-emoji-tiny", device="cpu")
    model, tokenizer, transform = loader.get_model(), loader.get_tokenizer(), loader.get_transform()
    picture = Image.new("RGB", (72, 72), "white")
    ImageDraw.Draw(picture).ellipse((8, 8, 64, 64), fill=(220, 40, 40))
    similarity = model.similarity(transform(picture)[None], tokenizer(["dog face", "red circle", "blue square"]))
    assert similarity.argmax().item() == 1


def test_loading_does_not_import_torchs_compiler(tmp_path):
    """It takes seconds, and building a network on meta asks for it."""
    save(Clip(TINY), tmp_path)
    code = f"""if True:
        import sys
        from zoo import AutoLoader
        AutoLoader({TASK!r}, "clip", weights={str(tmp_path)!r}, device="cpu").get_model()
        print("torch._dynamo" in sys.modules)
    """
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
