"""The two-optimizer loop: what it computes, what it leaves, what it refuses."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from zoo import weights
from zoo.errors import SettingsError, TrainingDiverged
from zoo.training import rng
from zoo.training.adversarial import Adversary, adaptive_weight, verdict_loss
from zoo.training.batches import DatasetBatches

TOY = Path(__file__).with_name("adversarial_toy.py")


@pytest.fixture(scope="module")
def game() -> ModuleType:
    spec = importlib.util.spec_from_file_location("adversarial_toy", TOY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def command(folder: Path, processes: int = 1, *more: object) -> subprocess.CompletedProcess:
    words = [sys.executable, str(TOY), str(folder), str(processes), *map(str, more)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


def lines(folder: Path) -> list[dict]:
    """What log.jsonl says that is not of the clock or the machine."""
    keep = ("step", "loss", "lr", "grad_norm", "pixel", "perceptual", "adversarial", "adaptive_weight")
    keep += ("discriminator_loss", "discriminator_real", "discriminator_drawn")
    read = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in keep if name in line} for line in read]


def equal(a: Path, b: Path) -> bool:
    a, b = weights.read(a / "model.safetensors"), weights.read(b / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what it computes ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("micro", [1, 2])
def test_the_loop_equals_taming_s_written_by_hand(game, micro):
    """Whole gradients through the model for each part, as VQLPIPSWithDiscriminator takes them; two plain Adams."""
    trainer = game.trainer(None, gradient_accumulation_steps=micro, lr_decay="constant")
    ours, theirs = game.Autoencoder(), game.Autoencoder()
    trainer.train(ours, train_dataset=game.Pictures())

    judge, distance = game.discriminator(), game.Distance()
    first, second = (torch.optim.Adam(m.parameters(), lr=1e-2, betas=(0.5, 0.9)) for m in (theirs, judge))
    rng.seed_all(1234, 0)
    theirs.train()
    batches = DatasetBatches(game.Pictures(), trainer.settings, None)
    for number, (_, batch) in enumerate(batches.between(0, 8 * micro)):
        step = number // micro
        found = theirs(batch["image"])
        drawn, target = found["image"], found["target"]
        loss = found["loss"] + 2.0 * distance(batch["image"], (drawn + 1) / 2).mean()
        if step >= 4:
            verdict = -judge(drawn).mean()
            last = theirs.decode.weight
            pulled = torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
            pushed = torch.autograd.grad(verdict, last, retain_graph=True)[0].norm()
            loss = loss + 0.5 * (pulled / (pushed + 1e-4)) * verdict
        (loss / micro).backward(inputs=list(theirs.parameters()))
        if step >= 2:
            hinge = (F.relu(1 - judge(target)).mean() + F.relu(1 + judge(drawn.detach())).mean()) / 2
            (hinge / micro).backward()
        if number % micro == micro - 1:
            first.step()
            first.zero_grad()
            if step >= 2:
                second.step()
                second.zero_grad()
    for mine, other in ((ours, theirs), (trainer.discriminator, judge)):
        for name, tensor in other.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)
    assert not torch.equal(judge[0].weight, game.discriminator()[0].weight)


def test_the_log_s_loss_is_the_model_s_and_the_perceptual_one(game, tmp_path):
    trainer = game.trainer(tmp_path, lr=1e-9, log_interval=1, lr_decay="constant")
    model = game.Autoencoder()
    model.drop.p = 0.0
    trainer.train(model, train_dataset=game.Pictures())
    _, batch = next(DatasetBatches(game.Pictures(), trainer.settings, None).between(7, 8))
    found = model(batch["image"])
    distance = game.Distance()(batch["image"], (found["image"] + 1) / 2).mean()
    last = lines(tmp_path)[-1]
    assert last["loss"] == pytest.approx(float((found["loss"] + 2 * distance).detach()), rel=1e-4)
    assert last["perceptual"] == pytest.approx(float(distance.detach()), rel=1e-4)
    assert last["pixel"] == pytest.approx(float(found["pixel"]), rel=1e-4)
    assert "discriminator_loss" not in lines(tmp_path)[1]  # steps 0 and 1 have no discriminator yet
    assert "discriminator_loss" in lines(tmp_path)[2] and "adversarial" not in lines(tmp_path)[3]
    assert "adversarial" in lines(tmp_path)[4]


def test_the_adaptive_weight_is_the_ratio_of_norms_and_has_a_cap():
    ours, theirs = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 0.5])
    assert float(adaptive_weight(ours, theirs, 1e4)) == pytest.approx(5 / 0.5001)
    assert float(adaptive_weight(ours, 0 * theirs, 1e3)) == 1e3
    assert adaptive_weight(ours.bfloat16(), theirs.bfloat16(), 1e4).dtype == torch.float32


def test_the_hinge_loss_stops_pushing_beyond_one():
    real, drawn = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.25])
    found = verdict_loss({"target": real, "image": drawn}, torch.nn.Identity())
    assert float(found["loss"]) == pytest.approx(((0 + 0.5) / 2 + (0 + 1.25) / 2) / 2)
    assert float(found["real"]) == 1.25 and float(found["drawn"]) == -1.375


def test_two_processes_equal_one_with_the_whole_batch(tmp_path, game):
    """Started by the script itself; the discriminator without BatchNorm, whose statistics are each process's own."""
    two = command(tmp_path / "two", 2)
    assert two.returncode == 0, two.stderr[-2000:]
    model = game.Autoencoder()
    model.drop.p = 0.0
    game.trainer(tmp_path / "one", norm=False, batch_size=8, ema=0.9).train(model, train_dataset=game.Pictures())
    for one, other in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert other == pytest.approx(one, rel=1e-4)
    one, other = (weights.read(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-5)


# --- what it leaves --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("processes, kill_at", [(1, 6), (1, 8), (2, 5)])
def test_killed_and_started_again_it_ends_bit_for_bit_the_same(tmp_path, processes, kill_at):
    """Weights, averages, both optimizers, BatchNorm's buffers and the log's means, which a line sums over two steps
    and a checkpoint may cut."""
    more = ["norm"] if processes > 1 else []
    whole = command(tmp_path / "whole", processes, -1, *more)
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert command(tmp_path / "cut", processes, kill_at, *more).returncode != 0
    assert not (tmp_path / "cut/model.safetensors").exists()
    again = command(tmp_path / "cut", processes, -1, *more)
    assert again.returncode == 0, again.stderr[-2000:]
    assert equal(tmp_path / "whole", tmp_path / "cut")
    assert lines(tmp_path / "whole") == lines(tmp_path / "cut")
    for rank in range(processes):
        name = f"checkpoints/step-00000008/rank-{rank:05d}.pieces.safetensors"
        one, other = (weights.read(tmp_path / run / name) for run in ("whole", "cut"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_the_discriminator_is_in_checkpoints_and_not_in_the_model(game, tmp_path):
    game.trainer(tmp_path).train(game.Autoencoder(), train_dataset=game.Pictures())
    exported = weights.read(tmp_path / "model.safetensors")
    assert exported.keys() == game.Autoencoder().state_dict().keys()
    kept = weights.read(next((tmp_path / "checkpoints").glob("*8")) / "rank-00000.pieces.safetensors")
    assert {"weights/discriminator.0.weight", "exp_avg/discriminator.0.weight", "exp_avg/decode.weight"} <= kept.keys()


# --- what it refuses, and sees ---------------------------------------------------------------------------------------
def test_a_discriminator_that_knows_all_rests(game, caplog, tmp_path):
    """A limit no loss is above: it never learns, that is said once, and the log says how often."""
    trainer = game.trainer(tmp_path, adversary={"rest": 100.0})
    with caplog.at_level(logging.WARNING, "zoo.training"):
        trainer.train(game.Autoencoder(), train_dataset=game.Pictures())
    assert torch.equal(trainer.discriminator[0].weight, game.discriminator()[0].weight)
    assert sum("rests until" in record.message for record in caplog.records) == 1
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["discriminator_rests"] == 1.0


def test_a_discriminator_that_is_no_longer_finite_ends_the_run(game):
    trainer = game.trainer(None, steps=40, adversary={"adversarial": 0.0})
    with torch.no_grad():
        trainer.discriminator[0].weight.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="discriminator"):
        trainer.train(game.Autoencoder(), train_dataset=game.Pictures())


@pytest.mark.parametrize(
    "words, said",
    [
        ({"env_type": "deepspeed"}, "pytorchDDP"),
        ({"precision": "fp16"}, "bf16"),
        ({"compile": True}, "compile=False"),
    ],
)
def test_what_does_not_go_with_a_discriminator_is_refused_at_the_door(game, words, said):
    with pytest.raises(SettingsError, match=said):
        game.trainer(None, **words)


def test_auto_is_ddp_under_deepspeed_s_launcher(game, monkeypatch):
    from zoo.training import engines
    from zoo.training.launch import Place

    place = Place(
        rank=0, world_size=2, local_rank=0, local_world_size=2, master_addr="", master_port=1, launcher="deepspeed"
    )
    monkeypatch.setattr(engines, "find_place", lambda: place)
    assert game.trainer(None, env_type="auto").engine_type().__name__ == "DdpEngine"


def test_a_model_without_a_last_layer_and_a_clash_of_names_are_refused(game):
    with pytest.raises(SettingsError, match="last_layer"):
        game.trainer(None).train(torch.nn.Linear(2, 2), train_dataset=game.Pictures())
    model = game.Autoencoder()
    model.discriminator = torch.nn.Linear(1, 1)
    with pytest.raises(SettingsError, match="rename"):
        game.trainer(None).train(model, train_dataset=game.Pictures())


@pytest.mark.parametrize("name", ["perceptual", "cap", "rest"])
def test_an_adversary_has_no_negative_numbers(name):
    with pytest.raises(SettingsError, match=name):
        Adversary(**{name: -1.0})
    with pytest.raises(SettingsError, match="perceptual_share"):
        Adversary(perceptual_share=0.0)


def test_the_perceptual_part_may_look_at_some_pictures_of_a_batch(game):
    """At half of them it has twice the gradient there and none elsewhere, as the mean of half a batch has."""
    gradients = []
    for share in (1.0, 0.5):
        trainer = game.trainer(None, adversary={"perceptual_share": share})
        model, image = game.Autoencoder().eval(), torch.rand(4, 3, 8, 8)
        torch.manual_seed(0)
        image = torch.rand(4, 3, 8, 8)
        found = model(image)
        found["loss"] = 0 * found["loss"]
        pair = trainer.open_engine(trainer.engine_type(), model, None, trainer.settings)
        loss = trainer._generator_loss(pair, found, False)
        gradients.append(torch.autograd.grad(loss, found["image"])[0])
    torch.testing.assert_close(gradients[1][:2], 2 * gradients[0][:2])
    assert gradients[0][2:].any() and not gradients[1][2:].any()


def test_another_adversary_is_another_run(game, tmp_path):
    game.trainer(tmp_path, steps=4).train(game.Autoencoder(), train_dataset=game.Pictures())
    with pytest.raises(SettingsError, match="adversary_adversarial"):
        game.trainer(tmp_path, steps=4, adversary={"adversarial": 0.1}).train(
            game.Autoencoder(), train_dataset=game.Pictures()
        )
