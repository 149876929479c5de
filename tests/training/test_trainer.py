"""The loop: what it trains, with what, and what it refuses."""

from __future__ import annotations

import json
import signal

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from zoo import weights
from zoo.errors import DeviceNotFound, EmptyDataset, SettingsError, TrainingDiverged
from zoo.training import Trainer


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_accumulating_4_x_2_equals_one_batch_of_8(toy, optimizer):
    """SGD, for Adam does not see the size of a gradient; and without clipping, which hides it too."""

    def trained(batch_size: int, accumulation: int) -> dict:
        model = toy.Net(dropout=0.0)
        words = dict(steps=3, batch_size=batch_size, gradient_accumulation_steps=accumulation, clip_grad=0)
        call = {"optimizer": optimizer(model.parameters(), lr=1e-2)}
        return toy.train(None, model, toy.Points(24), call, **words).state_dict()

    one, two = trained(8, 1), trained(2, 4)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-6)
    assert not toy.same(one, toy.Net(dropout=0.0))


def test_the_loss_falls(toy, tmp_path):
    toy.train(tmp_path, steps=60, batch_size=8, log_interval=10)
    losses = [line["loss"] for line in toy.lines(tmp_path)]
    assert losses[-1] < 0.2 * losses[0]


def test_the_loop_equals_one_written_by_hand(toy):
    """Same batches, AdamW, clipping and rates: same weights, bit for bit."""
    from zoo.training import rng
    from zoo.training.batches import DatasetBatches

    trainer = Trainer(**toy.settings(None, steps=6, clip_grad=0.5, weight_decay=0.0, warm_up=0, lr_decay="linear"))
    ours, by_hand = toy.Net(), toy.Net()
    trainer.train(ours, train_dataset=toy.Points())

    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    rng.seed_all(1234, 0)
    for number, (_, batch) in enumerate(DatasetBatches(toy.Points(), trainer.settings, None).between(0, 12)):
        (by_hand(**batch)["loss"] / 2).backward()
        if number % 2:
            nn.utils.clip_grad_norm_(by_hand.parameters(), 0.5)
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - (number // 2) / 6)
            optimizer.step()
            optimizer.zero_grad()
    assert toy.same(ours, by_hand)


def test_epochs_are_the_updates_that_their_batches_give(toy, tmp_path):
    """22 samples are 2 updates of 2 x 4 per epoch; what is left of an epoch for no whole update is left out."""
    toy.train(tmp_path, steps=None, epochs=3, log_interval=1)
    assert [line["step"] for line in toy.lines(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in toy.lines(tmp_path)] == [0, 0, 1, 1, 2, 2]


def test_an_epoch_of_less_than_a_batch_is_one_batch(toy, tmp_path):
    """FlagAI's example: two pairs, batches of 64."""
    data = toy.Points(2)
    toy.train(tmp_path, data=data, steps=None, epochs=5, batch_size=64, gradient_accumulation_steps=1)
    assert toy.lines(tmp_path)[-1]["step"] == 5
    assert sorted(data.read) == [0] * 5 + [1] * 5


def test_the_log_has_what_is_promised_and_each_step_once(toy, tmp_path):
    result = Trainer(**toy.settings(tmp_path)).train(toy.Net(), train_dataset=toy.Points())
    lines = toy.lines(tmp_path, times=True)
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
    learnt, times = ["step", "epoch", "loss", "lr", "grad_norm"], ["samples_per_s", "data_wait", "seconds"]
    assert list(lines[0]) == [*learnt, *times, "memory_gb", "tflops"]
    assert 0 <= lines[0]["data_wait"] <= 1
    assert result == lines[-1]


def test_the_logged_loss_is_the_mean_since_the_line_before(toy, tmp_path):
    losses = []

    class Watched(Trainer):
        def forward_step(self, data, model, mems=None):
            output = model(**data)
            losses.append(float(output["loss"].detach()))
            return output

    Watched(**toy.settings(tmp_path, log_interval=3)).train(toy.Net(), train_dataset=toy.Points())
    means = [sum(losses[i : i + 6]) / 6 for i in range(0, 24, 6)]
    assert [line["loss"] for line in toy.lines(tmp_path)] == pytest.approx(means, rel=1e-5)


def test_the_run_folder_holds_the_weights_and_their_config(toy, tmp_path):
    model = toy.train(tmp_path, keep=2)
    assert toy.same(weights.read(tmp_path), model)
    assert json.loads((tmp_path / "config.json").read_text()) == model.config
    assert sorted(path.name for path in tmp_path.glob("checkpoints/*")) == ["step-00000009", "step-00000012"]


def test_any_module_with_a_loss_can_be_trained():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(3.0))

        def forward(self, numbers):
            return {"loss": (self.rate - numbers).square().mean()}

    model = Strange()
    collate = lambda rows: {"numbers": torch.tensor(rows), "uid": ["kept from the model"], "meta": None}  # noqa: E731
    words = dict(steps=50, batch_size=2, lr=0.3, progress=False, pytorch_device="cpu")
    Trainer(**words).train(model, train_dataset=[1.0, 1.0, 1.0, 1.0], collate_fn=collate)
    assert abs(model.rate.item() - 1) < 0.2


def test_forward_step_can_be_overridden(toy):
    class Halved(Trainer):
        def forward_step(self, data, model, mems=None):
            x, y = data
            return {"loss": (model.layers(x) - y).abs().mean()}

    model, rows = toy.Net(), TensorDataset(torch.ones(8, 4), torch.ones(8, 1))
    Halved(**toy.settings(None)).train(model, train_dataset=rows)
    assert not toy.same(model, toy.Net())
    with pytest.raises(SettingsError, match="collate_fn"):
        toy.train(None, data=rows)


@pytest.mark.parametrize(
    ("output", "said"), [(torch.ones(()), "a Tensor"), ({"logits": 1}, "logits"), ({"loss": torch.ones(2)}, r"\(2,\)")]
)
def test_a_missing_loss_is_named(toy, output, said):
    class Wrong(toy.Net):
        def forward(self, x, y):
            return output

    with pytest.raises(SettingsError, match=said):
        toy.train(None, Wrong())


def test_a_loss_that_depends_on_nothing_trained_is_refused(toy):
    class Apart(toy.Net):
        def forward(self, x, y):
            return {"loss": y.mean()}

    with pytest.raises(SettingsError, match="no parameter"):
        toy.train(None, Apart())


def test_an_empty_data_set_is_refused(toy):
    with pytest.raises(EmptyDataset):
        toy.train(None, data=toy.Points(0))
    with pytest.raises(EmptyDataset):
        toy.train(None, data=DataLoader(toy.Points(3), 4, drop_last=True))
    with pytest.raises(SettingsError, match="NoneType"):
        Trainer(**toy.settings(None)).train(toy.Net())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_batch_does_not_spoil_the_weights(toy, tmp_path, bad):
    data = toy.Points()

    class Once(toy.Killed):
        def forward(self, x, y):
            output = super().forward(x, y)
            return output | {"loss": output["loss"] * bad} if self.calls == self.at else output

    model = toy.train(tmp_path, Once(7, instead=lambda: None), data, log_interval=1)
    lines = toy.lines(tmp_path)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert [line["step"] for line in lines if "left_out" in line] == [4]
    assert lines[3]["loss"] is None and lines[4]["loss"] > 0


def test_a_diverged_run_ends_and_keeps_its_checkpoints(toy, tmp_path):
    class Diverges(toy.Killed):
        def forward(self, x, y):
            output = super().forward(x, y)
            return output | {"loss": output["loss"] * float("nan")} if self.calls > 10 else output

    with pytest.raises(TrainingDiverged, match="step 25.*lr"):
        toy.train(tmp_path, Diverges(-1), steps=100, save_interval=5, log_interval=2)
    kept = weights.read(tmp_path / "checkpoints" / "step-00000020" / "rank-00000.pieces.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()


def test_gradients_of_before_are_not_used(toy):
    stale, fresh = toy.Net(), toy.Net()
    stale(torch.ones(1, 4), torch.ones(1, 1))["loss"].backward()
    assert toy.same(toy.train(None, stale), toy.train(None, fresh))


def test_a_model_is_trained_in_training_mode_whatever_it_was_in(toy, whole):
    assert toy.same(toy.train(None, toy.Net().eval()), whole["state"])


def test_the_models_chance_is_its_own(toy):
    """Dropout draws the same whether or not samples draw, so neither data nor evaluation disturb it."""

    def masks(**words):
        seen = []

        class Watched(toy.Net):
            def forward(self, x, y):
                if self.training:
                    seen.append(torch.nn.functional.dropout(torch.ones(8), 0.5))
                return super().forward(x, y)

        toy.train(None, Watched(), steps=4, eval_interval=1, **words)
        return torch.stack(seen)

    quiet = [{"x": torch.ones(4), "y": torch.ones(1)}] * 22
    expected = masks(data=quiet)
    assert torch.equal(masks(), expected)
    assert torch.equal(masks(call={"valid_dataset": toy.Points(5)}), expected)
    assert torch.equal(masks(num_workers=1), expected)
    assert torch.equal(masks(data=DataLoader(toy.Points(), 4, shuffle=True, drop_last=True)), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_ready_data_loader_is_resumed_exactly(toy, tmp_path, workers):
    def loader():
        return DataLoader(toy.Points(), 4, shuffle=True, num_workers=workers)

    def stop():
        raise RuntimeError

    mid_epoch = {"save_interval": 4}  # 8 micro-batches, and an epoch has 6
    expected = toy.train(tmp_path / "a", data=loader(), **mid_epoch)
    with pytest.raises(RuntimeError):
        toy.train(tmp_path / "b", toy.Killed(13, stop), loader(), **mid_epoch)
    assert toy.same(toy.train(tmp_path / "b", data=loader(), **mid_epoch), expected)
    assert toy.lines(tmp_path / "b") == toy.lines(tmp_path / "a")


def test_an_iterable_data_set_needs_steps(toy, tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from (toy.Points()[i] for i in range(10))

    toy.train(tmp_path, data=Stream())
    assert toy.lines(tmp_path)[-1]["step"] == 12
    with pytest.raises(SettingsError, match="give steps"):
        toy.train(None, data=Stream(), steps=None, epochs=1)


def test_ctrl_c_saves_and_the_run_goes_on(toy, whole, tmp_path):
    interrupted = toy.Killed(10, lambda: signal.raise_signal(signal.SIGINT))  # the second micro-batch of step 5
    with pytest.raises(KeyboardInterrupt, match="after step 5 of 12; run the same command"):
        toy.train(tmp_path, interrupted)
    assert (tmp_path / "checkpoints" / "step-00000005").is_dir()
    assert toy.same(toy.train(tmp_path), whole["state"])
    assert toy.lines(tmp_path) == whole["lines"]


def test_bf16_computes_in_bf16_over_fp32_weights(toy):
    seen = []

    class Watched(toy.Net):
        def forward(self, x, y):
            output = super().forward(x, y)
            seen.append(self.layers[0](x).dtype)
            return output

    model = toy.train(None, Watched(), precision="bf16")
    assert set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_what_a_device_cannot_do_is_said(toy):
    with pytest.raises(SettingsError, match="bf16"):
        toy.train(None, fp16=True)
    for device in ("cuda:99", "gpu"):
        with pytest.raises(DeviceNotFound, match=f"{device}.*has: cpu"):
            toy.train(None, pytorch_device=device)


def test_half_weights_are_not_trained(toy):
    with pytest.raises(SettingsError, match=r"layers.0.weight and 5 more .* model.float\(\)"):
        toy.train(None, toy.Net().bfloat16())


def test_activations_are_recomputed_where_the_model_can(toy):
    with pytest.raises(SettingsError, match="Net has no set_grad_checkpointing"):
        toy.train(None, checkpoint_activations=True)

    class Can(toy.Net):
        def set_grad_checkpointing(self, enable=True):
            self.enabled = enable

    assert toy.train(None, Can(), checkpoint_activations=True).enabled is True


def test_a_compiled_model_is_called_and_the_plain_one_is_saved(toy, whole, tmp_path, monkeypatch):
    called = []

    class Compiled(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.plain = model

        def forward(self, **batch):
            called.append(1)
            return self.plain(**batch)

    monkeypatch.setattr(torch, "compile", Compiled)
    assert toy.same(toy.train(tmp_path, compile=True), whole["state"])
    assert len(called) == 24
    assert toy.same(weights.read(tmp_path), whole["state"])


def test_an_unknown_engine_is_named_at_the_door():
    with pytest.raises(SettingsError, match="nearest: pytorch"):
        Trainer(env_type="pytorhc")


def test_a_config_that_json_cannot_hold_is_said_before_training(toy, tmp_path):
    model = toy.Net()
    model.config = {"dtype": torch.float32}
    with pytest.raises(SettingsError, match="model.config"):
        toy.train(tmp_path, model)


def test_the_best_weights_must_be_chosen_by_a_number_there_is(toy):
    with pytest.raises(SettingsError, match="gives nothing"):
        toy.train(None, best="R@1", maximise=True)
    with pytest.raises(SettingsError, match="gives R@5"):
        toy.train(None, best="R@1", maximise=True, call={"evaluate": lambda model: {"R@5": 1.0}})


def test_tied_weights_are_saved_and_resumed(toy, tmp_path):
    class Tied(toy.Net):
        def __init__(self):
            super().__init__(dropout=0.0)
            self.again = self.layers[0]

    expected = toy.train(tmp_path / "a", Tied())
    toy.train(tmp_path / "b", Tied(), lr_decay="constant", warm_up=1, steps=4)
    resumed = toy.train(tmp_path / "b", Tied(), lr_decay="constant", warm_up=1, steps=6)
    assert resumed.again.weight is resumed.layers[0].weight
    assert toy.same(weights.read(tmp_path / "a"), expected)
