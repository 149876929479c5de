"""`zoo generate` and `zoo eval text2img`, on a DALL-E of random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from zoo import AutoLoader, weights
from zoo.cli import FAILED, main
from zoo.hub import File, fetch
from zoo.models.dalle import Dalle, DalleConfig
from zoo.models.dalle_transformer import TransformerConfig
from zoo.models.dvae import DvaeConfig

CONFIG = DalleConfig(
    image=DvaeConfig(size=32, vocab=16, hidden=8, stem=4, groups=3, blocks=1),
    transformer=TransformerConfig(
        text_vocab=2048, text_length=12, vocab=16, grid=8, width=16, depth=4, heads=2, kernel=3
    ),
)


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    torch.manual_seed(0)
    weights.write(Dalle(CONFIG).state_dict(), tmp_path / "w/model.safetensors")
    (tmp_path / "w/config.json").write_text(json.dumps(asdict(CONFIG)))
    vocabulary = fetch(File(name="bpe.json.gz", packaged="emoji_dalle_bpe.json.gz"))
    shutil.copyfile(vocabulary, tmp_path / "w/bpe.json.gz")
    return ["--model", "dalle", "--weights", str(tmp_path / "w"), "--device", "cpu"]


def test_the_loader_gives_a_model_that_takes_text(options, tmp_path):
    model = AutoLoader("text2img", "dalle", weights=tmp_path / "w", device="cpu").get_model()
    ((picture,),) = model.generate("red apple")
    assert picture.size == (32, 32)


def test_the_pictures_are_those_of_the_model(options, tmp_path, capsys: pytest.CaptureFixture):
    settings = ["--n", "2", "--seed", "5", "--temperature", "0.9", "--top-k", "9", "--top-p", "0.95", "--guidance", "2"]
    assert main(["generate", "red apple", "红心", *options, *settings, "--out", str(tmp_path / "out")]) == 0
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert names == ["red-apple.png", "red-apple-2.png", "红心.png", "红心-2.png", "grid.png"]
    model = AutoLoader("text2img", "dalle", weights=tmp_path / "w", device="cpu").get_model()
    expected = model.generate(["red apple", "红心"], 2, 5, temperature=0.9, top_k=9, top_p=0.95, guidance=2)
    for name, picture in zip(names[:4], [*expected[0], *expected[1]], strict=True):
        assert Image.open(tmp_path / "out" / name).tobytes() == picture.tobytes()


def test_a_stable_diffusion_draws_over_a_picture_and_inside_a_mask(tmp_path, capsys: pytest.CaptureFixture):
    image, mask = Image.effect_noise((64, 64), 90).convert("RGB"), Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 64, 20))
    image.save(tmp_path / "image.png"), mask.save(tmp_path / "mask.png")
    given = ["--image", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png"), "--strength", "0.5"]
    how = ["--sampler", "euler_a", "--steps", "4", "--negative", "face", "--guidance", "2", "--seed", "3"]
    options = ["--model", "sd-emoji-tiny", "--device", "cpu", "--out", str(tmp_path / "out")]
    seen = ["--preview", str(tmp_path / "now.png")]
    assert main(["generate", "red apple", *options, *given, *how, *seen]) == 0
    model = AutoLoader("text2img", "sd-emoji-tiny", device="cpu").get_model()
    words = {"sampler": "euler_a", "steps": 4, "negative": "face", "guidance": 2.0, "strength": 0.5}
    ((expected,),) = model.generate("red apple", 1, 3, image=image, mask=mask, **words)
    assert Image.open(tmp_path / "out/red-apple.png").tobytes() == expected.tobytes()
    assert Image.open(tmp_path / "now.png").width > 64


def test_a_size_and_additions_reach_stable_diffusion(tmp_path, capsys: pytest.CaptureFixture):
    model = AutoLoader("text2img", "sd-emoji-tiny", device="cpu").get_model()
    name = next(n for n, _ in model.unet.named_parameters() if n.endswith("attn2.to_k.weight")).removesuffix(".weight")
    wide, width = model.unet.get_submodule(name).weight.shape
    lora = {f"unet.{name}.lora_A.weight": torch.ones(1, width), f"unet.{name}.lora_B.weight": torch.ones(wide, 1)}
    weights.write(lora, tmp_path / "lora.safetensors")
    weights.write({"<toy>": torch.ones(1, width)}, tmp_path / "toy.safetensors")
    options = ["--model", "sd-emoji-tiny", "--device", "cpu", "--steps", "2", "--size", "32x64"]
    added = ["--lora", f"{tmp_path / 'lora.safetensors'}:0.5", "--concept", str(tmp_path / "toy.safetensors")]
    assert main(["generate", "apple", *options, "--out", str(tmp_path / "plain")]) == 0
    assert main(["generate", "apple <toy>", *options, *added, "--out", str(tmp_path / "added")]) == 0
    assert "say <toy> in a prompt" in capsys.readouterr().out
    plain, changed = Image.open(tmp_path / "plain/apple.png"), Image.open(tmp_path / "added/apple-toy.png")
    assert plain.size == changed.size == (32, 64) and plain.tobytes() != changed.tobytes()


def test_what_is_exported_is_the_same_model_when_it_is_read_again(tmp_path, capsys: pytest.CaptureFixture):
    assert main(["export", "sd-emoji-tiny", str(tmp_path / "folder")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "folder")
    card = AutoLoader("text2img", "sd-emoji-tiny", device="cpu").get_model()
    again = AutoLoader("text2img", "stable-diffusion", weights=tmp_path / "folder", device="cpu").get_model()
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in card.state_dict().items())
    words = {"steps": 3, "guidance": 2, "sampler": "ddim", "progress": False}
    first, second = (model.generate("a red apple", **words)[0][0].tobytes() for model in (card, again))
    assert first == second


@pytest.mark.parametrize(
    ("model", "message"),
    [("sd-emoji-tiny", "no place for this noise schedule"), ("clip-gen-emoji-tiny", "is no Stable Diffusion")],
)
def test_what_a_single_file_cannot_hold_is_not_exported(model, message, tmp_path, capsys: pytest.CaptureFixture):
    assert main(["export", model, str(tmp_path / "one.safetensors")]) == FAILED
    assert message in capsys.readouterr().err and not (tmp_path / "one.safetensors").exists()


@pytest.mark.parametrize(
    ("model", "option", "message"),
    [
        ("sd-emoji-tiny", ["--temperature", "0.7"], "--temperature is of another kind"),
        ("sd-emoji-tiny", ["--sampler", "eulr"], "euler"),
        ("sd-emoji-tiny", ["--size", "30x31"], "multiples of 4"),
        ("clip-gen-emoji-tiny", ["--steps", "3"], "--steps is of another kind"),
        ("clip-gen-emoji-tiny", ["--lora", "x"], "for Stable Diffusion"),
    ],
)
def test_what_another_kind_of_model_takes_is_refused(model, option, message, tmp_path, capsys: pytest.CaptureFixture):
    assert main(["generate", "apple", "--model", model, *option, "--out", str(tmp_path)]) == FAILED
    assert message in capsys.readouterr().err


def test_no_picture_is_written_over_another(options, tmp_path):
    for seed in ("0", "1"):
        assert main(["generate", "red/apple!", *options, "--seed", seed, "--out", str(tmp_path / "out")]) == 0
    first, second = (Image.open(tmp_path / "out" / f"red-apple{end}.png").tobytes() for end in ("", "-2"))
    assert first != second


def test_the_best_of_several_is_kept(options, tmp_path):
    for name, more in (("all", ["--n", "4"]), ("best", ["--candidates", "4", "--rerank", "clip-emoji-tiny"])):
        assert main(["generate", "cow", *options, *more, "--out", str(tmp_path / name)]) == 0
    drawn = [Image.open(tmp_path / "all" / f"cow{end}.png") for end in ("", "-2", "-3", "-4")]
    from zoo.commands.model_options import load_scorer

    scores = load_scorer("clip-emoji-tiny", "cpu")("cow", drawn)
    assert Image.open(tmp_path / "best/cow.png").tobytes() == drawn[scores.index(max(scores))].tobytes()


def test_first_rows_and_a_preview(options, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    more = ["--first-rows", str(tmp_path / "red.png"), "8", "--out", str(tmp_path / "out")]
    assert main(["generate", "cow", *options, *more]) == FAILED  # all eight rows are given
    more[2] = "6"
    assert main(["generate", "cow", *options, *more, "--preview", str(tmp_path / "now.png")]) == 0
    loader = AutoLoader("text2img", "dalle", weights=tmp_path / "w", device="cpu")
    image = loader.get_transform()(Image.open(tmp_path / "red.png"))
    ((expected,),) = loader.get_model().generate("cow", first_rows=(image, 6))
    assert Image.open(tmp_path / "out/cow.png").tobytes() == expected.tobytes()
    assert Image.open(tmp_path / "now.png").width > 32


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["cow", "--n", "0"], "give 1 or more"),
        (["cow", "--candidates", "4"], "rerank"),
        (["cow", "--first-rows", "no.png", "two"], "no number of rows"),
        (["a " * 40], "shorten it"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line(options, tmp_path, argv, said, capsys: pytest.CaptureFixture):
    assert main(["generate", *argv, *options, "--out", str(tmp_path / "out")]) == FAILED
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


def test_found_again_counts_whose_prompt_is_first(options, tmp_path, capsys: pytest.CaptureFixture):
    from zoo.commands.evaluate_text2img import found_again
    from zoo.commands.model_options import Matcher
    from zoo.data import open_dataset

    loader = AutoLoader("txt_img_matching", "clip-emoji-tiny", device="cpu")
    words = {"model": loader.get_model(), "tokenizer": loader.get_tokenizer(), "transform": loader.get_transform()}
    dataset = open_dataset("emoji", "test", language=None)
    pictures = [dataset[i][0] for i in range(0, 400, 10)]
    prompts = [dataset.row(i)["caption_en"] for i in range(0, 400, 10)]
    captions = list(dict.fromkeys(dataset.row(i)["caption_en"] for i in range(400)))
    shares = found_again(Matcher(**words, device="cpu"), pictures, prompts, captions)
    assert 0.8 < shares[1] <= shares[5] <= shares[10] <= 1
    wrong = found_again(Matcher(**words, device="cpu"), pictures[::-1], prompts, captions)
    assert wrong[1] < 0.1


def test_eval_tells_each_number_of_candidates(options, capsys: pytest.CaptureFixture):
    argv = ["eval", "text2img", *options, "--prompts", "6", "--candidates", "1", "3", "--language", "zh"]
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompts"] == 6 and set(found["recall"]) == {"1", "3"}
    assert main(argv) == 0
    assert "best of 3, by the same model" in capsys.readouterr().out
