"""What a model is judged by, with labels and without, and that judging leaves no trace."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from zoo import weights
from zoo.errors import EmptyDataset, SettingsError
from zoo.training import Trainer, rng


class Classes:
    """Samples of class i % 3; the model gets them right when i < 6 of 9."""

    def __len__(self):
        return 9

    def __getitem__(self, i):
        return {"x": torch.eye(3)[(i if i < 6 else i + 1) % 3], "labels": torch.tensor(i % 3)}


class Echo(nn.Module):
    """Logits are the input."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x, labels=None):
        return {"logits": self.scale * x, "loss": self.scale * x[:, 0].mean()}


def accuracy(logits, labels, meta=None):
    return (logits.argmax(1) == labels).float().mean()


def trainer(**changed):
    return Trainer(**dict(batch_size=4, progress=False, pytorch_device="cpu") | changed)


def test_metrics_see_all_logits_and_labels_whatever_their_signature():
    seen = {}

    def with_tokenizer(logits, labels, meta=None, tokenizer=None):
        seen.update(tokenizer=tokenizer, shape=tuple(logits.shape), meta=meta)
        return accuracy(logits, labels)

    def with_anything(logits, labels, **words):
        return len(words)

    def plain(logits, labels):
        return labels.sum()

    metrics = [["a", accuracy], ["b", with_tokenizer], ["c", with_anything], ["d", plain]]
    found = trainer(tokenizer="mine").evaluate(Echo(), Classes(), metrics)
    assert found == {"loss": pytest.approx(1 / 3), "a": pytest.approx(6 / 9), "b": found["a"], "c": 2.0, "d": 9.0}
    assert seen == {"tokenizer": "mine", "shape": (9, 3), "meta": None}


@pytest.mark.parametrize("batch_size", [1, 2, 4, 9, 50])
def test_the_loss_is_the_mean_over_samples_whatever_the_batch(batch_size):
    assert trainer(batch_size=batch_size).evaluate(Echo(), Classes())["loss"] == pytest.approx(1 / 3)
    assert trainer().evaluate(Echo(), DataLoader(Classes(), batch_size))["loss"] == pytest.approx(1 / 3)


def test_labels_are_not_needed(toy):
    assert trainer().evaluate(toy.Net(), toy.Points())["loss"] > 0
    found = trainer().evaluate(toy.Net(), toy.Points(), [["spread", lambda logits, labels: logits.std()]])
    assert found["spread"] > 0
    with pytest.raises(SettingsError, match="'accuracy'.*no batch holds labels or target_ids"):
        trainer().evaluate(toy.Net(), toy.Points(), [["accuracy", accuracy]])


def test_a_fault_in_a_metric_is_its_own():
    def broken(logits, labels):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        trainer().evaluate(Echo(), Classes(), [["broken", broken]])


def test_metrics_without_logits_or_data_are_refused(toy):
    class Quiet(nn.Module):
        def forward(self, x, labels):
            return {"loss": x.mean()}

    with pytest.raises(SettingsError, match="logits"):
        trainer().evaluate(Quiet(), Classes(), [["a", accuracy]])
    with pytest.raises(SettingsError, match="valid_dataset"):
        toy.train(None, call={"metric_methods": [["a", accuracy]]})
    with pytest.raises(EmptyDataset):
        trainer().evaluate(Echo(), [])


def test_evaluation_leaves_modes_gradients_and_chance_as_they_were(toy):
    model = toy.Net().train()
    model.layers[3].eval()
    modes = [module.training for module in model.modules()]
    rng.seed_all(3)
    expected = torch.rand(4)
    rng.seed_all(3)
    numbers = [trainer().evaluate(model, toy.Points()) for _ in range(2)]
    assert torch.equal(torch.rand(4), expected)
    assert numbers[0] == numbers[1]  # no dropout, and the same noise
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_a_model_is_judged_in_evaluation_mode(toy):
    dropping, whole = toy.Net(dropout=0.5).train(), toy.Net(dropout=0.0)
    assert trainer().evaluate(dropping, toy.Points()) == trainer().evaluate(whole, toy.Points())


def test_a_loss_that_draws_is_the_same_every_time():
    """As a diffusion model's, which draws noise and timesteps."""

    class Noisy(Echo):
        def forward(self, x, labels):
            return {"loss": (x + torch.randn_like(x)).square().mean()}

    first = trainer().evaluate(Noisy(), Classes())
    torch.rand(1)
    assert trainer().evaluate(Noisy(), Classes()) == first


def test_a_runs_numbers_are_in_its_log_and_the_best_are_kept(toy, tmp_path):
    """A worse number does not replace the best; the loss of the data set and the client's numbers stand together."""
    values = iter([float("nan"), 5.0, 9.0, 7.0])
    words = dict(valid_dataset=toy.Points(5), evaluate=lambda model: {"R@1": next(values)})
    toy.train(tmp_path, steps=8, eval_interval=2, log_interval=3, best="R@1", maximise=True, call=words)
    lines = toy.lines(tmp_path)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 8]
    assert [line["eval"]["R@1"] for line in lines if "eval" in line] == [None, 5.0, 9.0, 7.0]
    best = json.loads((tmp_path / "best" / "metrics.json").read_text())
    assert (best["step"], best["R@1"]) == (6, 9.0)
    assert best["loss"] == lines[3]["eval"]["loss"]
    assert (tmp_path / "best" / "config.json").read_text() == (tmp_path / "config.json").read_text()
    assert not toy.same(weights.read(tmp_path / "best"), weights.read(tmp_path))


def test_by_default_the_lowest_loss_is_the_best(toy, tmp_path):
    toy.train(tmp_path, steps=6, eval_interval=1, call={"valid_dataset": toy.Points(5)})
    losses = {line["step"]: line["eval"]["loss"] for line in toy.lines(tmp_path)}
    assert json.loads((tmp_path / "best" / "metrics.json").read_text())["step"] == min(losses, key=losses.get)
