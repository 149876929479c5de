"""The scripts of examples/ run as a user runs them, and what they leave can be used."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from zoo import AutoLoader, weights
from zoo.cli import main
from zoo.models.dvae import Dvae, DvaeConfig

EXAMPLES = Path(__file__).parent.parent / "examples"


def start(script: str, *args: str, cwd: Path) -> subprocess.Popen:
    pipe, environment = subprocess.PIPE, os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / script), *args]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)


def run(script: str, *args: str, cwd: Path, code: int = 0) -> str:
    out, err = (process := start(script, *args, cwd=cwd)).communicate(timeout=300)
    assert process.returncode == code, err[-3000:]
    return out


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
    assert (tmp_path / "out/config.json").read_text() == "{}"


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
    sys.path.insert(0, str(EXAMPLES))
    try:
        from train_dvae import DvaeTrainer
    finally:
        sys.path.pop(0)
    trainer = DvaeTrainer(kl_weight=6.6, kl_steps=5_000, temperature_steps=0.05, evenness=0, steps=1)
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


def test_few_pictures_are_not_learnt_by_heart_unless_asked():
    sys.path.insert(0, str(EXAMPLES))
    try:
        from train_dalle import parse
    finally:
        sys.path.pop(0)
    given = (["--run-folder", "x"], ["--pairs", "p.tsv"], ["--code-dropout", "0.3"])
    assert [parse(argv).code_dropout for argv in given] == [1.0, 0.0, 0.3]
