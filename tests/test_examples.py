"""The scripts of examples/ run as a user runs them, and what they leave can be used."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from zoo import AutoLoader, weights
from zoo.additions import add_lora
from zoo.cli import main
from zoo.commands.autoencoders import draw_reconstructions
from zoo.commands.model_options import vocabulary_files
from zoo.errors import DataError, SettingsError
from zoo.models.dvae import Dvae, DvaeConfig
from zoo.models.kl_vae import KlVae, KlVaeConfig
from zoo.models.text_encoder import text_of

EXAMPLES = Path(__file__).parent.parent / "examples"


def start(script: str, *args: str, cwd: Path) -> subprocess.Popen:
    pipe, environment = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / script), *args]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)


def run(script: str, *args: str, cwd: Path, code: int = 0) -> str:
    """What it says."""
    out, err = (process := start(script, *args, cwd=cwd)).communicate(timeout=300)
    assert process.returncode == code, err[-3000:]
    return out + err


def script(name: str) -> ModuleType:
    """A script, to look inside."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        return import_module(name)
    finally:
        sys.path.pop(0)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Forty pictures and their captions."""
    folder = tmp_path_factory.mktemp("pairs")
    lines = ["title\tfilepath"]
    for i in range(40):
        Image.new("RGB", (70 + i, 80), (6 * i, 255 - 5 * i, (40 * i) % 256)).save(folder / f"{i}.png")
        lines.append(f"colour number {i}\t{i}.png")
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    return folder


def settings(pairs: Path, folder: str) -> list[str]:
    data = ["--pairs", str(pairs / "pairs.tsv"), "--pictures", str(pairs), "--run-folder", folder]
    return [*data, "--steps", "14", "--batch-size", "16", "--save-interval", "3", "--log-interval", "1"]


def lines(folder: Path) -> list[dict]:
    file = folder / "log.jsonl"
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text.splitlines()]


def test_clip_training_killed_at_three_random_steps_ends_in_the_same_weights(pairs, tmp_path):
    run("train_clip.py", *settings(pairs, "whole"), cwd=tmp_path)
    whole = weights.read(tmp_path / "whole")

    folder = tmp_path / "killed"
    for step in sorted(random.sample(range(1, 14), 3)):
        process = start("train_clip.py", *settings(pairs, "killed"), cwd=tmp_path)
        deadline = time.monotonic() + 120
        while len(lines(folder)) < step and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        err = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, f"was to be killed at step {step}: {err[-1000:]}"
    run("train_clip.py", *settings(pairs, "killed"), cwd=tmp_path)

    killed = weights.read(folder)
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    same = ("step", "loss", "lr", "grad_norm")
    assert [[line[k] for k in same] for line in lines(folder)] == [
        [line[k] for k in same] for line in lines(tmp_path / "whole")
    ]


def test_what_clip_training_leaves_is_loaded_by_name_with_its_tokenizer(pairs, tmp_path):
    run("train_clip.py", *settings(pairs, "run"), "--loss", "sigmoid", "--chunk", "5", cwd=tmp_path)
    assert {"settings.json", "log.jsonl", "checkpoints", "model.safetensors", "config.json", "merges.txt.gz"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    loader = AutoLoader("txt_img_matching", "clip", weights=tmp_path / "run")
    model, tokenizer = loader.get_model(), loader.get_tokenizer()
    tokens = tokenizer.tokenize_as_tensor(["colour number 1", "颜色"])
    image = loader.get_transform()(Image.new("RGB", (70, 80)))[None]
    assert tokenizer.vocab_size == 4096
    assert model.config.loss == "sigmoid"
    assert model.similarity(image, tokens).shape == (1, 2)


def test_going_on_from_packaged_weights_keeps_their_tokenizer(pairs, tmp_path):
    run("train_clip.py", *settings(pairs, "run"), "--model", "clip-emoji-tiny", "--lr", "1e-5", cwd=tmp_path)
    before = AutoLoader("txt_img_matching", "clip-emoji-tiny")
    after = AutoLoader("txt_img_matching", "clip", weights=tmp_path / "run")
    words = ["red heart", "红心"]
    tokens = after.get_tokenizer().tokenize_as_tensor(words)
    assert torch.equal(tokens, before.get_tokenizer().tokenize_as_tensor(words))
    with torch.inference_mode():
        a, b = (loader.get_model().encode_text(tokens) for loader in (before, after))
    assert not torch.equal(a, b)
    assert torch.cosine_similarity(a, b).min() > 0.98  # fourteen small steps


@pytest.mark.parametrize(
    ("family", "first", "sizes"),
    [
        ("clip", None, ""),
        ("dalle", "dvae", "--width 16 --depth 1 --heads 2"),
        ("clip-gen", "vqgan", "--width 16 --depth 1 --heads 2"),
        ("stable-diffusion", "kl_vae", "--widths 8 12 --attention 1 --heads 2 --groups 4"),
    ],
)
def test_the_best_weights_are_loaded_as_they_are_with_their_own_tokenizer(family, first, sizes, request, tmp_path):
    stage = [f"--{first.removeprefix('kl_')}", str(request.getfixturevalue(first))] if first else []
    kept = ["--run-folder", "run", "--steps", "1", "--batch-size", "4"]
    run(f"train_{family.replace('-', '_')}.py", *stage, *sizes.split(), *kept, cwd=tmp_path)
    task, words = "txt_img_matching" if family == "clip" else "text2img", ["red heart", "红心"]
    packaged = ("text2img", "dalle-emoji-tiny") if family == "dalle" else ("txt_img_matching", "clip-emoji-tiny")
    wanted = AutoLoader(*packaged).get_tokenizer().tokenize_as_tensor(words, context_length=12)
    for folder in (tmp_path / "run", tmp_path / "run/best"):
        loader = AutoLoader(task, family, weights=folder)
        assert sum(p.numel() for p in loader.get_model().parameters()) > 1000
        assert torch.equal(loader.get_tokenizer().tokenize_as_tensor(words, context_length=12), wanted)


def test_a_folder_of_published_weights_hands_on_its_tokenizer_and_nothing_else(tmp_path):
    folder = tmp_path / "model"
    for name in ("tokenizer/vocab.txt", "tokenizer/tokenizer_config.json", "merges.txt.gz", "log.jsonl", "config.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    weights.write({"w": torch.zeros(1)}, folder / "model.safetensors")
    found = vocabulary_files(AutoLoader("text2img", "stable-diffusion", weights=folder))
    assert found.keys() == {"tokenizer/vocab.txt", "tokenizer/tokenizer_config.json", "merges.txt.gz"}
    published = AutoLoader("text2img", "sd-emoji-tiny")
    assert vocabulary_files(published) == published.tokenizer_files()


def test_a_dalle_that_is_gone_on_with_keeps_its_own_vocabulary(pairs, tmp_path):
    with pytest.raises(SettingsError, match="--vocabulary is of a new model"):
        script("train_dalle").main(["--model", "dalle-emoji-tiny", "--vocabulary", "x", "--run-folder", str(tmp_path)])


def test_a_run_folder_is_not_gone_on_with_on_other_data(pairs, tmp_path):
    run("train_clip.py", *settings(pairs, "run"), cwd=tmp_path)
    process = start("train_clip.py", *settings(pairs, "run"), "--language", "zh", cwd=tmp_path)
    assert "choose a new run_folder" in process.communicate(timeout=120)[1]
    assert process.returncode != 0


def test_what_ships_is_the_run_with_matrices_in_half_precision(tmp_path):
    state = {"w": torch.randn(4, 4), "b": torch.randn(4), "n": torch.tensor(3)}
    weights.write(state, tmp_path / "run/model.safetensors")
    (tmp_path / "run/config.json").write_text("{}")
    run("package_model.py", "run", "out", cwd=tmp_path)
    out = weights.read(tmp_path / "out")
    assert torch.equal(out["w"], state["w"].half()) and torch.equal(out["b"], state["b"]) and out["n"] == 3
    assert json.loads((tmp_path / "out/config.json").read_text()) == {}


def test_the_settings_of_clip_training_are_explained():
    out = run("train_clip.py", "--help", cwd=EXAMPLES)
    for word in ("--env-type", "--steps", "--batch-size", "--run-folder", "--seed"):
        assert word in out


def test_what_dvae_training_leaves_is_loaded_by_name(pairs, tmp_path):
    sizes = ["--size", "32", "--vocab", "16", "--hidden", "8", "--stem", "8"]
    data = ["--pictures", str(pairs), "--run-folder", "run"]
    settings = [*data, *sizes, "--steps", "12", "--batch-size", "4", "--log-interval", "4"]
    run("train_dvae.py", *settings, "--simulate-suspend", "6", "--save-interval", "6", cwd=tmp_path, code=75)
    run("train_dvae.py", *settings, cwd=tmp_path)  # and goes on
    loader = AutoLoader("img_tokenizing", "dvae", weights=tmp_path / "run")
    image = loader.get_transform()(Image.new("RGB", (70, 80), "red"))[None]
    codes = loader.get_model().encode(image)
    assert codes.shape == (1, 4, 4) and loader.get_model().decode(codes).shape == image.shape
    assert lines(tmp_path / "run")[-1]["step"] == 12


def test_the_dvaes_annealing_follows_the_step_along_the_papers_cosines():
    trainer = script("train_dvae").DvaeTrainer(
        kl_weight=6.6, kl_steps=5_000, temperature_steps=0.05, evenness=0, steps=1
    )
    trainer.total = 3_000_000  # so that the temperature falls over 150,000 steps
    told: dict[int, dict] = {}
    for step in (0, 2_500, 5_000, 75_000, 150_000, 2_000_000):
        trainer.step = step
        trainer.forward_step({"image": None}, lambda step=step, **words: told.setdefault(step, words))
    weight, temperature = ([told[step][name] for step in told] for name in ("kl_weight", "temperature"))
    assert weight == pytest.approx([0, 3.3, 6.6, 6.6, 6.6, 6.6])
    assert temperature[0] == pytest.approx(1) and temperature[4:] == pytest.approx([1 / 16, 1 / 16])
    assert temperature[3] == pytest.approx((1 + 1 / 16) / 2)


# --- DALL-E ---
@pytest.fixture(scope="module")
def dvae(tmp_path_factory) -> Path:
    """The folder of a small dVAE of random weights: 4 x 4 codes of 16 kinds."""
    folder, config = tmp_path_factory.mktemp("dvae"), DvaeConfig(size=32, vocab=16, hidden=8, stem=8, blocks=1)
    torch.manual_seed(0)
    weights.write(Dvae(config).state_dict(), folder / "model.safetensors", metadata={"config": asdict(config)})
    return folder


def dalle_settings(pairs: Path, dvae: Path, folder: str) -> list[str]:
    sizes = ["--dvae", str(dvae), "--width", "16", "--depth", "3", "--heads", "2", "--text-length", "8"]
    return [*settings(pairs, folder), *sizes]


def test_dalle_training_killed_and_started_again_ends_in_the_same_weights(pairs, dvae, tmp_path):
    run("train_dalle.py", *dalle_settings(pairs, dvae, "whole"), cwd=tmp_path)
    killed = dalle_settings(pairs, dvae, "killed")
    process = start("train_dalle.py", *killed, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while len(lines(tmp_path / "killed")) < 5 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    run("train_dalle.py", *killed, cwd=tmp_path)
    a, b = (weights.read(tmp_path / name) for name in ("whole", "killed"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    losses = [[line["loss"] for line in lines(tmp_path / name)] for name in ("whole", "killed")]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]


def test_what_dalle_training_leaves_draws_and_is_trained_on(pairs, dvae, tmp_path):
    settings = dalle_settings(pairs, dvae, "run")
    run("train_dalle.py", *settings, "--codes", "once", "--eval-interval", "7", cwd=tmp_path)
    assert [path.name for path in sorted((tmp_path / "run/samples").iterdir())] == ["000007.png", "000014.png"]
    loader = AutoLoader("text2img", "dalle", weights=tmp_path / "run")
    model = loader.get_model()
    ((picture,),) = model.generate("colour number 1")
    assert picture.size == (32, 32)
    assert model.config.caption_dropout == 0.1
    before = weights.read(dvae)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.dvae.state_dict().items())


def test_dalle_is_trained_on_codes_from_a_file_and_not_on_those_of_another_dvae(pairs, dvae, tmp_path):
    more = ["--pairs", str(pairs / "pairs.tsv"), "--pictures", str(pairs), "--out", str(tmp_path / "codes.safetensors")]
    assert main(["data", "encode", "--model", "dvae", "--weights", str(dvae), *more]) == 0
    codes = ["--codes", str(tmp_path / "codes.safetensors")]
    run("train_dalle.py", *dalle_settings(pairs, dvae, "run"), *codes, cwd=tmp_path)
    assert lines(tmp_path / "run")[-1]["step"] == 14

    config = DvaeConfig(size=32, vocab=16, hidden=8, stem=8, blocks=1)
    other = tmp_path / "other"
    weights.write(Dvae(config).state_dict(), other / "model.safetensors", metadata={"config": asdict(config)})
    process = start("train_dalle.py", *dalle_settings(pairs, other, "run2"), *codes, cwd=tmp_path)
    assert "made with another image tokenizer" in process.communicate(timeout=120)[1]


def test_dalle_built_in_pieces_draws_and_learns_as_in_one_process(pairs, dvae, tmp_path):
    plain = [*dalle_settings(pairs, dvae, "plain"), "--caption-dropout", "0", "--bpe-dropout", "0"]
    more = ["--steps", "4", "--eval-interval", "2"]
    run("train_dalle.py", *plain, *more, cwd=tmp_path)
    zero = ["--env-type", "deepspeed", "--deepspeed-config", "zero3", "--num-gpus", "2", "--batch-size", "8"]
    run("train_dalle.py", *plain, *more, *zero, "--run-folder", "zero3", cwd=tmp_path)
    a, b = ([line["loss"] for line in lines(tmp_path / name)] for name in ("plain", "zero3"))
    assert len(a) == 4 and b == pytest.approx(a, rel=1e-4)
    assert [path.name for path in sorted((tmp_path / "zero3/samples").iterdir())] == ["000002.png", "000004.png"]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("train_dalle", (["--run-folder", "x"], ["--pairs", "p.tsv"], ["--code-dropout", "0.3"])),
        ("train_clip_gen", (["--run-folder", "x"], ["--ds", "folder"], ["--code-dropout", "0.3"])),
    ],
)
def test_few_pictures_are_not_learnt_by_heart_unless_asked(name: str, given: tuple[list[str], ...]):
    assert [script(name).parse(argv).code_dropout for argv in given] == [1.0, 0.0, 0.3]


# --- CLIP-GEN ---
@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of pictures: in colour, grey, with alpha, smaller than what is cut out of the others, and broken."""
    folder, chance = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    kinds = {f"{i}": (40 + i, 48, 3) for i in range(8)} | {"grey": (40, 48), "alpha": (40, 48, 4), "small": (9, 7, 3)}
    for name, shape in kinds.items():
        Image.fromarray(chance.integers(0, 256, shape, np.uint8)).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes((folder / "0.png").read_bytes()[:999])
    return folder


def vqgan_settings(ds: Path | str, folder: str) -> list[str]:
    sizes = "--size 32 --widths 32 32 32 32 --attention 3 --latent 8 --vocab 16 --code-width 8 --disc-width 8"
    learning = "--decay 0.5 --restart 1 --disc-start 2 --disc-warm-up 1 --steps 8 --batch-size 4"
    kept = ["--ds", str(ds), "--run-folder", folder, "--log-interval", "1", "--eval-interval", "4"]
    return [*sizes.split(), *learning.split(), *kept]


@pytest.fixture(scope="module")
def vqgan(pictures, tmp_path_factory) -> Path:
    """What train_vqgan.py left: a VQGAN of 4 x 4 codes of 16 kinds."""
    folder = tmp_path_factory.mktemp("vqgan")
    run("train_vqgan.py", *vqgan_settings(pictures, "run"), cwd=folder)
    return folder / "run"


def left_out(said: str) -> list[str]:
    """The pictures that a run reports as left out."""
    reports = [line.partition("the next sample stands in: ")[2] for line in said.splitlines()]
    return [Path(report.partition(": ")[0]).name for report in reports if report]


def test_vqgan_training_that_was_suspended_ends_in_the_same_weights(pictures, vqgan, tmp_path):
    settings = vqgan_settings(pictures, "run")
    said = run("train_vqgan.py", *settings, "--simulate-suspend", "5", cwd=tmp_path, code=75)
    assert left_out(said) == ["broken.png"]
    assert lines(tmp_path / "run")[-1]["step"] == 5
    run("train_vqgan.py", *settings, cwd=tmp_path)
    whole, parts = weights.read(vqgan), weights.read(tmp_path / "run")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    same = ("step", "loss", "grad_norm", "discriminator_loss", "adaptive_weight")
    a, b = ([[line.get(k) for k in same] for line in lines(folder)] for folder in (vqgan, tmp_path / "run"))
    assert a == b and len(a) == 8 and a[-1][3] is not None and a[-1][4] is not None


def test_what_vqgan_training_leaves_is_loaded_by_name(vqgan):
    loader = AutoLoader("img_tokenizing", "vqgan", weights=vqgan)
    model = loader.get_model()
    image = loader.get_transform()(Image.new("RGB", (70, 80), "red"))[None]
    codes = model.encode(image)
    assert codes.shape == (1, 4, 4) and model.decode(codes).shape == image.shape == (1, 3, 32, 32)
    assert (model.config.decay, model.config.restart) == (0.5, 1)
    assert [path.name for path in sorted((vqgan / "samples").iterdir())] == ["000004.png", "000008.png"]


def test_a_vqgan_ships_without_how_its_codes_were_used_in_training(vqgan, tmp_path):
    run("package_model.py", str(vqgan), "out", cwd=tmp_path)
    model = AutoLoader("img_tokenizing", "vqgan", weights=tmp_path / "out").get_model()
    assert (model.config.decay, model.config.restart) == (0, 0)
    before, shipped = weights.read(vqgan), weights.read(tmp_path / "out")
    assert before.keys() - shipped.keys() == {"quantize.counts", "quantize.sums"}
    assert all(torch.equal(t, before[name].half() if t.ndim > 1 else before[name]) for name, t in shipped.items())


def test_a_vqgan_is_measured_on_held_out_emoji_as_it_is_trained_on_others(tmp_path):
    run("train_vqgan.py", *vqgan_settings("emoji", "run"), "--steps", "2", cwd=tmp_path)
    found = lines(tmp_path / "run")[-1]["eval"]
    assert found["pictures"] == 376 and 0 < found["psnr"] < 30  # every fifth of 1,876
    assert json.loads((tmp_path / "run/best/metrics.json").read_text())["psnr"] == found["psnr"]
    assert (tmp_path / "run/samples/000002.png").exists()


@pytest.mark.parametrize(("count", "rows"), [(3, 2), (8, 2), (11, 2), (16, 4), (32, 4), (40, 2)])
def test_each_picture_of_the_samples_stands_above_what_comes_back_of_it(count: int, rows: int, tmp_path):
    class Darker(torch.nn.Linear):
        def reconstruct(self, image: torch.Tensor) -> torch.Tensor:
            return image / 2

    shades = [(torch.full((3, 8, 8), 0.25 + i / 2 / count), None) for i in range(count)]
    draw_reconstructions(Darker(1, 1), shades, tmp_path / "x.png")
    picture = np.asarray(Image.open(tmp_path / "x.png").convert("L")) / 255
    cell, gap = 96, 8  # of zoo.pictures.grid
    middles = picture[gap + cell // 2 :: cell + gap, gap + cell // 2 :: cell + gap]
    assert len(middles) == rows
    assert middles[1::2] == pytest.approx(middles[0::2] / 2, abs=0.01)


def clip_gen_settings(ds: Path | str, vqgan: Path, folder: str) -> list[str]:
    sizes = ["--vqgan", str(vqgan), "--width", "16", "--depth", "2", "--heads", "2", "--batch-size", "4"]
    return ["--ds", str(ds), *sizes, "--run-folder", folder, "--steps", "4", "--log-interval", "1"]


def test_what_clip_gen_training_leaves_draws_from_texts_though_it_saw_none(pictures, vqgan, tmp_path):
    settings = clip_gen_settings(pictures, vqgan, "run")
    assert left_out(run("train_clip_gen.py", *settings, "--eval-interval", "2", cwd=tmp_path)) == ["broken.png"]
    assert [path.name for path in sorted((tmp_path / "run/samples").iterdir())] == ["000002.png", "000004.png"]
    model = AutoLoader("text2img", "clip-gen", weights=tmp_path / "run").get_model()
    apples, hearts = model.generate(["red apple", "红心"], n=2, progress=False)
    assert [picture.size for picture in apples + hearts] == [(32, 32)] * 4
    assert len(model.score("红心", hearts)) == 2
    clip = AutoLoader("txt_img_matching", "clip-emoji-tiny")
    tokens = clip.get_tokenizer().tokenize_as_tensor(["red apple", "红心"])
    assert torch.equal(model.tokenizer.tokenize_as_tensor(["red apple", "红心"]), tokens)
    for part, before in ((model.clip, clip.get_model().state_dict()), (model.vqgan, weights.read(vqgan))):
        assert all(torch.equal(tensor, before[name]) for name, tensor in part.state_dict().items())


def test_a_clip_gen_is_measured_on_held_out_emoji_as_it_is_trained_on_others(vqgan, tmp_path):
    run("train_clip_gen.py", *clip_gen_settings("emoji", vqgan, "run"), "--steps", "2", cwd=tmp_path)
    last = lines(tmp_path / "run")[-1]
    assert last["step"] == 2 and last["eval"]["loss"] == pytest.approx(math.log(16), abs=0.5)  # it knows nothing yet
    assert (tmp_path / "run/samples/000002.png").exists()


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory) -> Path:
    """Twelve pictures of which no crop can make another: of the VQGAN's size, and their own mirror images."""
    folder, chance = tmp_path_factory.mktemp("mirrored"), np.random.default_rng(0)
    for i in range(12):
        stripes = Image.fromarray(chance.integers(0, 256, (32, 1, 3), np.uint8))
        stripes.resize((32, 32)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def encoded(mirrored, vqgan, tmp_path_factory) -> Path:
    """The file of their codes and embeddings."""
    file = tmp_path_factory.mktemp("encoded") / "both.safetensors"
    words = ["--model", "vqgan", "--weights", str(vqgan), "--matcher", "clip-emoji-tiny", "--data", str(mirrored)]
    assert main(["data", "encode", *words, "--out", str(file)]) == 0
    return file


def test_clip_gen_learns_the_same_from_pictures_and_from_what_is_known_of_them(mirrored, vqgan, encoded, tmp_path):
    ways = {"pictures": [], "once": ["--cache", "once", "--views", "1"], "file": ["--cache", str(encoded)]}
    for name, way in ways.items():
        settings = [*clip_gen_settings(mirrored, vqgan, name), "--condition-dropout", "0", *way]
        run("train_clip_gen.py", *settings, cwd=tmp_path)
    pictures, once, file = ([line["loss"] for line in lines(tmp_path / name)] for name in ways)
    assert once == file and len(file) == 4
    assert file == pytest.approx(pictures, rel=1e-4)


def test_clip_gen_refuses_a_file_by_another_clip_or_vqgan(mirrored, vqgan, encoded, tmp_path):
    clip = AutoLoader("txt_img_matching", "clip-emoji-tiny")
    vocabulary = clip.tokenizer_files()["merges.txt.gz"]
    others = {"clip": (clip.get_model().state_dict(), clip.config), "vqgan": (weights.read(vqgan), None)}
    for name, (state, config) in others.items():
        first = next(iter(state))
        weights.write(state | {first: state[first] + 1e-3}, tmp_path / name / "model.safetensors")
        text = (vqgan / "config.json").read_text() if config is None else json.dumps(config)
        (tmp_path / name / "config.json").write_text(text)
    weights.copy_file(vocabulary, tmp_path / "clip/merges.txt.gz")
    settings = [*clip_gen_settings(mirrored, vqgan, str(tmp_path / "run")), "--cache", str(encoded)]
    train = script("train_clip_gen").main
    with pytest.raises(DataError, match="made with another image tokenizer"):
        train([*settings, "--vqgan", str(tmp_path / "vqgan")])
    with pytest.raises(DataError, match="no embeddings by this CLIP"):
        train([*settings, "--clip", str(tmp_path / "clip")])


def test_a_vqgan_of_pictures_too_small_to_judge_is_refused_before_it_begins(tmp_path):
    assert "24 pixels or more" in run("train_vqgan.py", "--size", "16", "--run-folder", "run", cwd=tmp_path, code=1)
    assert not (tmp_path / "run").exists()


# --- Stable Diffusion ---
def kl_vae_settings(ds: Path | str, folder: str) -> list[str]:
    sizes = "--size 32 --widths 8 12 --latent 3 --groups 4 --disc-width 8 --kl-weight 1e-3"
    learning = "--disc-start 2 --disc-warm-up 1 --steps 8 --batch-size 4 --ema 0.5"
    kept = ["--ds", str(ds), "--run-folder", folder, "--log-interval", "1", "--eval-interval", "4"]
    return [*sizes.split(), *learning.split(), *kept]


@pytest.fixture(scope="module")
def kl_vae(pictures, tmp_path_factory) -> Path:
    """What train_kl_vae.py left: 16 x 16 latents of 3 numbers."""
    folder = tmp_path_factory.mktemp("kl_vae")
    run("train_kl_vae.py", *kl_vae_settings(pictures, "run"), cwd=folder)
    return folder / "run"


def test_kl_vae_training_that_was_suspended_ends_in_the_same_weights(pictures, kl_vae, tmp_path):
    settings = kl_vae_settings(pictures, "run")
    said = run("train_kl_vae.py", *settings, "--simulate-suspend", "5", cwd=tmp_path, code=75)
    assert left_out(said) == ["broken.png"] and lines(tmp_path / "run")[-1]["step"] == 5
    run("train_kl_vae.py", *settings, cwd=tmp_path)
    whole, parts = weights.read(kl_vae), weights.read(tmp_path / "run")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    same = ("step", "loss", "kl", "std", "grad_norm", "discriminator_loss", "adaptive_weight")
    a, b = ([[line.get(k) for k in same] for line in lines(folder)] for folder in (kl_vae, tmp_path / "run"))
    assert a == b and len(a) == 8 and None not in a[-1]


def test_what_kl_vae_training_leaves_is_a_kl_vae(kl_vae):
    config = KlVaeConfig.from_dict(json.loads((kl_vae / "config.json").read_text()))
    model = KlVae(config)
    model.load_state_dict(weights.read(kl_vae))
    assert (model.image_size, model.factor, model.channels, model.scale) == (32, 2, 3, 1.0)
    latents = model.encode(torch.rand(1, 3, 32, 32))
    assert latents.shape == (1, 3, 16, 16) and model.decode(latents).shape == (1, 3, 32, 32)
    assert [path.name for path in sorted((kl_vae / "samples").iterdir())] == ["000004.png", "000008.png"]


def test_a_kl_vae_is_trained_on_and_its_encoder_is_left_alone_if_that_is_asked_for(pictures, kl_vae, tmp_path):
    settings = [*kl_vae_settings(pictures, "run"), "--model", str(kl_vae), "--steps", "3"]
    run("train_kl_vae.py", *settings, "--decoder-only", cwd=tmp_path)
    before, after = weights.read(kl_vae), weights.read(tmp_path / "run")
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if name.startswith(("encoder.", "quant_conv."))}
    assert (kl_vae / "config.json").read_text() == (tmp_path / "run/config.json").read_text()
    run("train_kl_vae.py", *settings, "--run-folder", "whole", cwd=tmp_path)
    whole = weights.read(tmp_path / "whole")
    assert all((before[name] - whole[name]).abs().max() < 0.05 for name in before)  # it began with them
    assert not any(torch.equal(before[name], whole[name]) for name in before)


@pytest.fixture(scope="module")
def squares(tmp_path_factory) -> list[str]:
    """Pairs whose pictures no crop changes: of the VAE's size."""
    folder, chance = tmp_path_factory.mktemp("squares"), np.random.default_rng(0)
    rows = ["title\tfilepath"]
    for i in range(12):
        Image.fromarray(chance.integers(0, 256, (32, 32, 3), np.uint8)).save(folder / f"{i}.png")
        rows.append(f"square number {i}\t{i}.png")
    (folder / "pairs.tsv").write_text("\n".join(rows) + "\n")
    return ["--pairs", str(folder / "pairs.tsv"), "--pictures", str(folder)]


def sd_settings(kl_vae: Path, folder: str, *data: str) -> list[str]:
    sizes = ["--vae", str(kl_vae), *"--widths 8 12 --attention 1 --heads 2 --groups 4".split()]
    kept = "--steps 6 --batch-size 4 --log-interval 1 --save-interval 3 --eval-interval 3".split()
    return [*data, *sizes, "--run-folder", folder, *kept]


@pytest.fixture(scope="module")
def diffusion(kl_vae, squares, tmp_path_factory) -> Path:
    """What train_stable_diffusion.py left."""
    folder = tmp_path_factory.mktemp("diffusion")
    run("train_stable_diffusion.py", *sd_settings(kl_vae, "run", *squares), cwd=folder)
    return folder / "run"


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder)]


def test_stable_diffusion_training_that_was_suspended_ends_in_the_same_weights(kl_vae, squares, diffusion, tmp_path):
    settings = sd_settings(kl_vae, "run", *squares)
    run("train_stable_diffusion.py", *settings, "--simulate-suspend", "4", cwd=tmp_path, code=75)
    assert lines(tmp_path / "run")[-1]["step"] == 4
    run("train_stable_diffusion.py", *settings, cwd=tmp_path)
    whole, parts = weights.read(diffusion), weights.read(tmp_path / "run")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    assert losses(diffusion) == losses(tmp_path / "run") and len(losses(diffusion)) == 6


def test_what_stable_diffusion_training_leaves_is_loaded_by_name_and_draws(kl_vae, diffusion):
    assert [path.name for path in sorted((diffusion / "samples").iterdir())] == ["000003.png", "000006.png"]
    model = AutoLoader("text2img", "stable-diffusion", weights=diffusion).get_model()
    ((picture,),) = model.generate("square number 1", steps=2, progress=False)
    assert picture.size == (32, 32)
    assert (model.config.caption_dropout, model.config.noise.prediction) == (0.1, "v")
    before = weights.read(kl_vae)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.vae.state_dict().items())
    clip = AutoLoader("txt_img_matching", "clip-emoji-tiny")
    text = text_of(clip.get_model()).state_dict()
    assert all(torch.equal(tensor, text[name]) for name, tensor in model.text.state_dict().items())
    tokens = clip.get_tokenizer().tokenize_as_tensor(["红心"])
    assert torch.equal(model.tokenizer.tokenize_as_tensor(["红心"]), tokens)
    scale = model.config.vae.scale  # measured: latents of unit spread
    latents = torch.randn(9, 3, 32, 32).mul(0.3).add(0.5).clamp(0, 1)
    assert 0.2 < float(scale * model.vae.encode(latents, torch.randn(9, 3, 16, 16)).std()) < 5 and scale != 1


def encode_moments(kl_vae: Path, squares: list[str], out: Path, *more: str) -> None:
    words = ["--model", "kl-vae", "--weights", str(kl_vae), *squares, *more, "--out", str(out)]
    assert main(["data", "encode", *words]) == 0


def test_stable_diffusion_learns_the_same_from_pictures_and_from_what_is_known_of_them(
    kl_vae, squares, diffusion, tmp_path
):
    encode_moments(kl_vae, squares, tmp_path / "moments.safetensors")
    encode_moments(kl_vae, squares, tmp_path / "both.safetensors", "--matcher", "clip-emoji-tiny")
    state = weights.read(tmp_path / "both.safetensors")
    assert state["moments"].dtype == state["contexts"].dtype == torch.float16
    assert state["moments"].shape == (12, 6, 16, 16) and len(state["contexts"]) == 12
    for name in ("once", "moments.safetensors", "both.safetensors"):
        settings = sd_settings(kl_vae, f"run-{name}", *squares)
        run("train_stable_diffusion.py", *settings, "--cache", name, cwd=tmp_path)
        assert losses(tmp_path / f"run-{name}") == pytest.approx(losses(diffusion), rel=1e-3)


def test_stable_diffusion_refuses_a_file_by_another_vae_or_text_tower(kl_vae, squares, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode_moments(kl_vae, squares, tmp_path / "both.safetensors", "--matcher", "clip-emoji-tiny")
    train = script("train_stable_diffusion").main
    settings = [*sd_settings(kl_vae, "run", *squares), "--cache", "both.safetensors"]
    other = weights.read(kl_vae)
    first = next(iter(other))
    weights.write(other | {first: other[first] + 1e-3}, tmp_path / "vae/model.safetensors")
    (tmp_path / "vae/config.json").write_text((kl_vae / "config.json").read_text())
    with pytest.raises(DataError, match="these moments were made with another image tokenizer"):
        train([*settings, "--vae", str(tmp_path / "vae")])
    clip = AutoLoader("txt_img_matching", "clip-emoji-tiny")
    state = clip.get_model().state_dict()
    weights.write(state | {"text.embed.weight": state["text.embed.weight"] + 1e-3}, tmp_path / "clip/model.safetensors")
    (tmp_path / "clip/config.json").write_text(json.dumps(clip.config))
    weights.copy_file(clip.tokenizer_files()["merges.txt.gz"], tmp_path / "clip/merges.txt.gz")
    with pytest.raises(DataError, match="contexts in this file are by another text tower"):
        train([*settings, "--text", str(tmp_path / "clip")])


def test_stable_diffusion_learns_the_same_on_every_engine(kl_vae, squares, tmp_path):
    """On as many processes: each draws noise of its own."""
    ways = {"ddp": ["pytorchDDP"], "zero2": ["deepspeed"], "zero3": ["deepspeed", "--deepspeed-config", "zero3"]}
    for name, way in ways.items():
        settings = [*sd_settings(kl_vae, name, *squares), "--steps", "3", "--num-gpus", "2", "--batch-size", "2"]
        run("train_stable_diffusion.py", *settings, "--env-type", *way, cwd=tmp_path)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "ddp"), rel=1e-4)
        assert len(losses(tmp_path / name)) == 3 and (tmp_path / name / "samples/000003.png").exists()
    ddp, zero3 = (weights.read(tmp_path / name) for name in ("ddp", "zero3"))
    assert ddp.keys() == zero3.keys()
    assert all(torch.allclose(ddp[name], zero3[name], atol=1e-4) for name in ddp)


def test_lora_is_written_for_others_and_added_to_the_weights(squares, diffusion, tmp_path):
    settings = ["--model", str(diffusion), "--lora", "3", "--run-folder", "run", "--steps", "4", "--batch-size", "4"]
    run("train_stable_diffusion.py", *squares, *settings, "--simulate-suspend", "2", cwd=tmp_path, code=75)
    run("train_stable_diffusion.py", *squares, *settings, cwd=tmp_path)
    run("train_stable_diffusion.py", *squares, *settings, cwd=tmp_path)  # it is done: nothing changes
    base, merged, lora = (weights.read(p) for p in (diffusion, tmp_path / "run", tmp_path / "run/lora.safetensors"))
    assert base.keys() == merged.keys()
    layers = {name.rpartition(".lora_")[0] for name in lora}
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    assert layers == {name[:-7] for name in base if name.startswith("unet.") and name[:-7].endswith(ends)}
    changed = 0
    for name, before in base.items():
        if name[:-7] in layers and name.endswith(".weight"):
            down, up = lora[f"{name[:-7]}.lora_A.weight"], lora[f"{name[:-7]}.lora_B.weight"]
            assert down.shape == (3, before.shape[1]) and up.shape == (before.shape[0], 3)
            torch.testing.assert_close(merged[name], before + up @ down)
            changed += bool(up.any())
        else:
            assert torch.equal(merged[name], before), name
    assert changed == len(layers) > 5
    assert AutoLoader("text2img", "stable-diffusion", weights=tmp_path / "run").get_model().inpaints is False


def test_lora_of_the_text_tower_is_in_the_same_file_and_is_read_back(squares, diffusion, tmp_path):
    settings = ["--model", str(diffusion), "--lora", "2", "--train-text", "--steps", "3", "--batch-size", "4"]
    run("train_stable_diffusion.py", *squares, *settings, "--run-folder", "run", cwd=tmp_path)
    base, merged, lora = (weights.read(p) for p in (diffusion, tmp_path / "run", tmp_path / "run/lora.safetensors"))
    assert base.keys() == merged.keys()
    text = {name for name in lora if name.startswith("text_encoder.text_model.encoder.layers.")}
    blocks = sum(name.endswith("attention.qkv.weight") for name in base)
    assert len(text) == blocks * 4 * 2 and {name.split(".")[0] for name in lora} == {"unet", "text_encoder"}
    changed = {name.partition(".")[0] for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {"unet", "text"}
    model = AutoLoader("text2img", "stable-diffusion", weights=diffusion).get_model()
    add_lora(model, tmp_path / "run/lora.safetensors")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-6)


def test_dreambooth_learns_a_thing_beside_its_kind_and_the_text_tower_if_asked(pictures, squares, diffusion, tmp_path):
    kind = squares[-1]
    settings = ["--model", str(diffusion), "--instance", str(pictures), "--instance-prompt", "a sks square"]
    settings += ["--prior", kind, "--prior-prompt", "a square", "--caption-dropout", "0"]
    before = weights.read(diffusion)
    for name, more in {"unet": [], "both": ["--train-text"]}.items():
        kept = ["--run-folder", name, "--steps", "2", "--batch-size", "3", *more]
        run("train_stable_diffusion.py", *settings, *kept, cwd=tmp_path)
        after = weights.read(tmp_path / name)
        changed = {key.partition(".")[0] for key, tensor in after.items() if not torch.equal(tensor, before[key])}
        assert changed == ({"unet", "text"} if more else {"unet"})


def test_pictures_of_any_shape_are_batched_with_their_like_and_suspended_runs_go_on(kl_vae, tmp_path):
    folder, rows, chance = tmp_path / "shapes", ["title\tfilepath"], np.random.default_rng(0)
    folder.mkdir()
    for i in range(24):
        shape = [(32, 60), (70, 32), (40, 40)][i % 3]
        Image.fromarray(chance.integers(0, 256, (*shape, 3), np.uint8)).save(folder / f"{i}.png")
        rows.append(f"number {i}\t{i}.png")
    (folder / "pairs.tsv").write_text("\n".join(rows) + "\n")
    data = ["--pairs", str(folder / "pairs.tsv"), "--pictures", str(folder), "--buckets", "--size", "48"]
    run("train_stable_diffusion.py", *sd_settings(kl_vae, "whole", *data), cwd=tmp_path)
    parts = sd_settings(kl_vae, "parts", *data)
    run("train_stable_diffusion.py", *parts, "--simulate-suspend", "4", cwd=tmp_path, code=75)
    run("train_stable_diffusion.py", *parts, cwd=tmp_path)
    a, b = (weights.read(tmp_path / name) for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a) and losses(tmp_path / "whole") == losses(tmp_path / "parts")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--lora 4", "give --model"),
        ("--instance folder", "prompt too"),
        ("--prior folder --prior-prompt x", "beside --instance"),
        ("--cache once --buckets", "not with --buckets"),
        ("--instance f --instance-prompt x --buckets", "not for --instance"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: str, said: str):
    with pytest.raises(SettingsError, match=said):
        script("train_stable_diffusion").parse(options.split())


def test_options_may_stand_in_a_file():
    parse = script("train_stable_diffusion").parse
    args = parse([f"@{EXAMPLES / 'stable_diffusion_cc256.txt'}", "--lr", "1e-5"])
    assert args.widths == [192, 384, 576, 960] and args.steps == 240_000 and args.lr == 1e-5
    assert vars(parse([])) | {"run_folder": None} == vars(parse(["--run-folder", "x"])) | {"run_folder": None}
