"""The average follows the formula, is shown and taken away again, and comes back bit for bit."""

from __future__ import annotations

import pytest
import torch

from zoo import weights
from zoo.errors import SettingsError
from zoo.training.ema import Ema
from zoo.training.engines.base import Piece


class Engine:
    """One trained tensor and a frozen one, in this process."""

    def __init__(self, swaps: bool = False, dtype: torch.dtype = torch.float32):
        self.tensors = {"a": torch.randn(3, dtype=dtype), "frozen": torch.ones(2)}
        self.trained, self.swaps, self.refreshed = {"a": None}, swaps, 0

    def pieces(self) -> dict:
        return {"weights": {name: Piece(tensor, tuple(tensor.shape)) for name, tensor in self.tensors.items()}}

    def refresh(self) -> None:
        self.refreshed += 1


def test_each_step_is_the_formula():
    engine = Engine()
    ema, expected = Ema(0.9, engine), engine.tensors["a"].double()
    assert ema.pieces.keys() == {"a"}
    for n in range(1, 120):
        engine.tensors["a"].copy_(torch.randn(3))
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * engine.tensors["a"].double()
        torch.testing.assert_close(ema.pieces["a"].values.double(), expected, rtol=0, atol=1e-6)
    assert (1 + n) / (10 + n) > 0.9  # both parts of the rule were met


def test_a_rank_without_a_part_of_the_model_averages_nothing():
    engine = Engine()
    engine.trained = {}
    ema = Ema(0.9, engine)
    ema.update()
    with ema.shown():
        assert ema.updates == 1


def test_the_averages_are_shown_and_taken_away_also_after_an_error():
    engine = Engine()
    ema = Ema(0.9, engine)
    engine.tensors["a"].add_(1)
    own, average = engine.tensors["a"].clone(), ema.pieces["a"].values.clone()
    with pytest.raises(KeyError), ema.shown():
        assert torch.equal(engine.tensors["a"], average)
        assert engine.refreshed == 1
        raise KeyError
    assert torch.equal(engine.tensors["a"], own) and torch.equal(ema.pieces["a"].values, average)
    assert engine.refreshed == 2


def test_weights_on_nvme_are_not_averaged():
    with pytest.raises(SettingsError, match="ema=0"):
        Ema(0.9, Engine(swaps=True))


def test_weights_in_bf16_are_not_averaged():
    with pytest.raises(SettingsError, match="keeps them in bf16: set ema=0"):
        Ema(0.9, Engine(dtype=torch.bfloat16))


def averages(toy, decay: float, **words) -> list[dict]:
    """What a run's average is after each update, by the formula, from the weights after each update."""
    rows = []

    class Watched(toy.Net):
        def forward(self, x, y):
            rows.append({name: p.detach().clone() for name, p in self.named_parameters()})
            return super().forward(x, y)

    model = toy.train(None, Watched(), **words)
    micro = words.get("gradient_accumulation_steps", 2)
    after = [*rows[micro::micro], {name: p.detach() for name, p in model.named_parameters()}]
    found = [rows[0]]
    for n, now in enumerate(after, 1):
        rate = 1 - min(decay, (1 + n) / (10 + n))
        found.append({name: average.lerp(now[name], rate) for name, average in found[-1].items()})
    return found[1:]


@pytest.mark.parametrize("cut", [{}, {"gradient_accumulation_steps": 1}, {"gradient_accumulation_steps": 3}], ids=str)
def test_a_run_judges_and_exports_its_average_and_trains_on_its_own_weights(toy, tmp_path, cut):
    judged = []

    def evaluate(model):
        judged.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return {"R@1": len(judged)}

    expected, plain = averages(toy, 0.5, **cut), toy.train(None, **cut)
    best = dict(eval_interval=4, best="R@1", maximise=True)
    model = toy.train(tmp_path, call={"evaluate": evaluate}, ema=0.5, **best, **cut)
    assert toy.same(model, plain)  # it changes nothing of the training
    for found, by_hand in zip(judged, [expected[3], expected[7], expected[11]], strict=True):
        assert not toy.same(found, dict(plain.named_parameters()))
        for name in by_hand:
            torch.testing.assert_close(found[name], by_hand[name], rtol=0, atol=1e-7)
    for folder in (tmp_path, tmp_path / "best"):
        assert toy.same(weights.read(folder), judged[-1])


@pytest.mark.parametrize(("start", "at"), [(5, 5), (0.5, 6), (1, 1)], ids=str)
def test_a_late_average_begins_as_the_weights_and_counts_from_there(toy, tmp_path, start, at):
    judged, after = [], []

    def watch(into: list):
        return {
            "evaluate": lambda model: into.append({n: p.detach().clone() for n, p in model.named_parameters()}) or {}
        }

    words = {"gradient_accumulation_steps": 1, "eval_interval": 1}
    toy.train(None, call=watch(after), **words)
    toy.train(tmp_path, call=watch(judged), ema=0.3, ema_start=start, **words)
    average = after[at - 1]
    for step, (found, own) in enumerate(zip(judged, after, strict=True), 1):
        n = step - at
        decay = min(0.3, (1 + n) / (10 + n)) if n > 0 else 0
        average = {name: decay * average[name] + (1 - decay) * own[name] for name in own} if n > 0 else own
        for name in own:
            torch.testing.assert_close(found[name], average[name], rtol=0, atol=1e-6)
    assert not toy.same(judged[-1], after[-1])
    assert toy.same(weights.read(tmp_path), judged[-1])


def test_before_a_late_average_nothing_is_kept_of_it(toy, tmp_path):
    toy.train(tmp_path, ema=0.9, ema_start=7)
    for path in sorted((tmp_path / "checkpoints").iterdir()):
        kept = [name for name in weights.read(path / "rank-00000.pieces.safetensors") if name.startswith("ema/")]
        assert len(kept) == (len(toy.Net().state_dict()) if int(path.name[5:]) >= 7 else 0)


@pytest.mark.parametrize("at", [2, 10, 13, 14, 20])
@pytest.mark.parametrize("more", [{"ema_start": 6}, {"ema_start": 0.6, "ema_offload": True}], ids=str)
def test_a_resumed_late_average_is_bit_for_bit_the_uninterrupted_one(toy, tmp_path, at, more):
    def stop():
        raise KeyboardInterrupt

    words = dict(ema=0.9, eval_interval=5, call={"valid_dataset": toy.Points(3)}, **more)
    toy.train(tmp_path / "a", **words)
    with pytest.raises(KeyboardInterrupt):
        toy.train(tmp_path / "b", toy.Killed(at, stop), **words)
    toy.train(tmp_path / "b", **words)
    assert toy.same(*(weights.read(tmp_path / name / "model.safetensors") for name in ("a", "b")))
    assert toy.lines(tmp_path / "b") == toy.lines(tmp_path / "a")


def test_going_back_to_before_a_late_average_leaves_none():
    engine = Engine()
    ema = Ema(0.9, engine, start=2)
    for _ in range(4):
        engine.tensors["a"].add_(1)
        ema.update()
    assert ema.pieces
    ema.restore(None, {"updates": 1})
    assert not ema.pieces
    with ema.shown():
        pass
    engine.tensors["a"].fill_(3)
    ema.update()
    assert torch.equal(ema.pieces["a"].values, torch.full((3,), 3.0))


def test_an_average_that_is_offloaded_lies_on_the_cpu_and_is_the_same(toy, tmp_path):
    engine = Engine()
    ema = Ema(0.9, engine, offload=True)
    assert ema.pieces["a"].values.device.type == "cpu"
    assert ema.pieces["a"].values.data_ptr() != engine.tensors["a"].data_ptr()
    engine.tensors["a"].add_(1)
    before = ema.pieces["a"].values.clone()
    ema.update()
    torch.testing.assert_close(ema.pieces["a"].values, before.lerp(engine.tensors["a"], 9 / 11))  # by 1 - 2/11
    for name, more in {"here": {}, "away": {"ema_offload": True}}.items():
        toy.train(tmp_path / name, ema=0.9, **more)
    assert toy.same(*(weights.read(tmp_path / name) for name in ("here", "away")))


def test_where_an_average_lies_may_change_when_it_begins_may_not(toy, tmp_path):
    toy.train(tmp_path, steps=3, ema=0.9, ema_start=2)
    toy.train(tmp_path, steps=3, ema=0.9, ema_start=2, ema_offload=True)
    with pytest.raises(SettingsError, match="ema_start: .* 2"):
        toy.train(tmp_path, steps=3, ema=0.9, ema_start=1)


@pytest.mark.parametrize("words", [{"ema_start": 5}, {"ema_offload": True}], ids=str)
def test_a_start_without_an_average_is_refused(toy, words):
    with pytest.raises(SettingsError, match="give ema too"):
        toy.train(None, **words)


def test_an_evaluation_that_fails_leaves_the_weights_as_they_were(toy):
    def fails(model):
        raise KeyError("metric")

    model, expected = toy.Net(), toy.train(None, steps=4, lr_decay="constant")
    with pytest.raises(KeyError, match="metric"):
        toy.train(None, model, call={"evaluate": fails}, steps=4, eval_interval=4, ema=0.9, lr_decay="constant")
    assert toy.same(model, expected)


@pytest.mark.parametrize("at", [2, 7, 13, 20])
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_resumed_average_is_bit_for_bit_the_uninterrupted_one(toy, tmp_path, at, asynchronous):
    def stop():
        raise KeyboardInterrupt

    words = dict(ema=0.9, eval_interval=5, call={"valid_dataset": toy.Points(3)}, async_save=asynchronous)
    toy.train(tmp_path / "a", **words)
    with pytest.raises(KeyboardInterrupt):
        toy.train(tmp_path / "b", toy.Killed(at, stop), **words)
    toy.train(tmp_path / "b", **words)
    assert toy.same(*(weights.read(tmp_path / name / "model.safetensors") for name in ("a", "b")))
    assert toy.lines(tmp_path / "b") == toy.lines(tmp_path / "a")


def test_another_decay_is_refused(toy, tmp_path):
    toy.train(tmp_path, steps=3, ema=0.5)
    for other in (0.0, 0.9):
        with pytest.raises(SettingsError, match="ema: .* 0.5"):
            toy.train(tmp_path, steps=3, ema=other)
