"""A loss that stands out does not reach the weights, and a run that goes back goes on with other data."""

from __future__ import annotations

import itertools
import math
from collections import deque

import numpy as np
import pytest
import torch

from zoo import weights
from zoo.distributed import Channel
from zoo.errors import SettingsError, TrainingDiverged
from zoo.training import Trainer, guard
from zoo.training.batches import DatasetBatches, EpochSampler
from zoo.training.guard import HISTORY, LEAST, LIMIT, Guard, is_spike
from zoo.training.run import MOST_BACK


# --- what a spike is -------------------------------------------------------------------------------------------------
def spikes(losses, keep_spikes: bool = False) -> list[int]:
    """Where a run with these losses has spikes; those are not compared with later."""
    before, found = deque(maxlen=HISTORY), []
    for number, loss in enumerate(losses):
        if is_spike(loss, before):
            found.append(number)
        if number not in found or keep_spikes:
            before.append(loss)
    return found


def noise(seed: int, count: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=count)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("level", [3.0, 0.0, -3.0])
def test_steady_noise_is_never_a_spike(seed, level):
    assert spikes(level + 0.2 * noise(seed)) == []


@pytest.mark.parametrize("level", [3.0, -3.0, 100.0])
def test_the_limit_is_ten_robust_deviations_over_the_median(level):
    before = deque(level + 2 * noise(0, HISTORY), maxlen=HISTORY)
    middle = np.median(before)
    deviation = np.median(np.abs(np.array(before) - middle)) / 0.6744897501960817  # the upper quartile of a normal
    assert is_spike(middle + 1.001 * LIMIT * deviation, before)
    assert not is_spike(middle + 0.999 * LIMIT * deviation, before)
    assert not is_spike(middle - 100 * deviation, before)  # a loss that falls is welcome


@pytest.mark.parametrize("seed", range(3))
def test_a_jump_is_seen_wherever_it_comes_and_as_often(seed):
    losses, jumps = 3 + 0.2 * noise(seed), [LEAST, 57, 58, 59, 200, 399]
    losses[jumps] += 0.2 * 15
    assert spikes(losses) == jumps


def test_one_spike_does_not_hide_another():
    losses = 3 + 0.2 * noise(1)
    losses[[50, 60, 70]] = 1e6
    assert spikes(losses, keep_spikes=True) == [50, 60, 70]


@pytest.mark.parametrize(
    "losses",
    [
        [1 + 0.01 * n for n in range(400)],
        [1.01**n for n in range(400)],
        [-4 + 0.02 * n for n in range(400)],
        [8 / (1 + n) for n in range(400)],
        [5.0] * 400,
        [0.0] * 400,
        [5.0] * 50 + [5.4] * 50,
    ],
    ids=["linear", "exponential", "through zero", "falling", "constant", "zero", "a small step"],
)
def test_what_moves_slowly_or_not_at_all_is_no_spike(losses):
    assert spikes(losses) == []


def test_after_constant_losses_a_jump_is_one():
    assert is_spike(5.6, deque([5.0] * LEAST)) and not is_spike(5.4, deque([5.0] * LEAST))


def test_the_first_losses_are_compared_with_nothing():
    losses = [10.0 ** (n % 7) for n in range(LEAST)]
    assert spikes(losses) == []
    assert not is_spike(1e9, deque([1.0] * (LEAST - 1))) and is_spike(1e9, deque([1.0] * LEAST))


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_the_engines_to_leave_out(loss):
    assert not is_spike(loss, deque([1.0] * LEAST))


# --- the guard -------------------------------------------------------------------------------------------------------
def fed(watch: Guard, losses: list[float]) -> list[bool]:
    """Which of these micro-batches' losses came out as nan."""
    return [bool(watch.pass_on(torch.tensor(loss)).isnan()) for loss in losses]


def test_the_mean_of_an_updates_micro_batches_is_judged():
    watch = Guard("skip", 2, Channel())
    assert not any(fed(watch, [1.0, 3.0] * LEAST))
    assert fed(watch, [1e3, 1.0, 1.0, 3.0, 1.0, 1e3]) == [False, True, False, False, False, True]
    assert fed(watch, [2 - 1e3, 2 + 1e3]) == [False, False]
    assert watch.spikes == 2 and len(watch.before) == LEAST + 2


def test_all_ranks_judge_the_mean_over_ranks():
    class Two(Channel):
        def total(self, mine, one):
            return [mine + other.pop(0), one + 1]

    other, watch = [2.0] * LEAST + [2.0, 1e6], Guard("skip", 1, Two())
    assert fed(watch, [2.0] * (LEAST + 1)) == [False] * (LEAST + 1)
    assert fed(watch, [2.0]) == [True]  # only the other rank's stands out
    assert set(watch.before) == {2.0}


def test_keep_watches_nothing_and_waits_for_nobody():
    class Refuses(Channel):
        def total(self, *numbers):
            raise AssertionError

    watch = Guard("keep", 1, Refuses())
    assert not any(fed(watch, [1.0] * LEAST + [1e9]))
    assert not watch.wants_back(torch.tensor(math.nan)) and watch.before == deque()


def test_losses_that_are_not_finite_are_not_compared_with():
    watch = Guard("skip", 1, Channel())
    fed(watch, [1.0, math.nan] * LEAST)
    assert set(watch.before) == {1.0} and watch.spikes == 0


def test_going_back_is_for_spikes_and_for_bad_gradients_in_a_row():
    watch, good, bad = Guard("rollback", 1, Channel()), torch.tensor(1.0), torch.tensor(math.inf)
    norms = [*[bad] * (guard.BAD_IN_A_ROW - 1), good, *[bad] * guard.BAD_IN_A_ROW]
    assert [watch.wants_back(norm) for norm in norms] == [False] * (len(norms) - 1) + [True]
    watch.load(watch.state())
    assert not watch.wants_back(bad)
    fed(watch, [1.0] * LEAST + [1e9])
    assert watch.wants_back(torch.tensor(math.nan))


def test_a_stored_guard_goes_on():
    first = Guard("skip", 2, Channel())
    fed(first, [1.0, 2.0] * 30 + [1e9])
    second = Guard("skip", 2, Channel())
    second.load(first.state())
    assert fed(second, [1.0, 2.0, 1.0, 50.0]) == [False, False, False, True]


# --- runs ------------------------------------------------------------------------------------------------------------
STEPS, BAD = 40, 27  # so many updates of two micro-batches; the update at which the loss explodes
WORDS = dict(steps=STEPS, save_interval=10, log_interval=1, lr=1e-3)


def micro_batch(toy, number: int, **changed):
    """The inputs x of micro-batch `number` of a run with these settings."""
    settings = Trainer(**toy.settings(None, **changed)).settings
    return next(iter(DatasetBatches(toy.Points(), settings, None).between(number, number + 1)))[1]["x"]


@pytest.fixture
def poisoned(toy):
    """A model whose loss is multiplied by `factor` wherever it meets the second micro-batch of update BAD."""
    poison = micro_batch(toy, 2 * BAD - 1)

    class Poisoned(toy.Killed):
        def __init__(self, factor: float, at: int = -1):
            super().__init__(at, lambda: stop(), dropout=0.2)
            self.factor, self.weights = factor, []

        def forward(self, x, y):
            output = super().forward(x, y)
            if self.training:
                self.weights.append(self.layers[0].weight.detach().clone())
            return output | {"loss": output["loss"] * self.factor} if torch.equal(x, poison) else output

    return Poisoned


def stop():
    raise KeyboardInterrupt


def test_a_spike_is_left_out_as_if_it_had_not_been(toy, tmp_path, poisoned):
    skipped = poisoned(1e6)
    toy.train(tmp_path / "a", skipped, on_spike="skip", **WORDS)
    assert toy.same(skipped, toy.train(tmp_path / "b", poisoned(math.nan), **WORDS))
    assert not toy.same(skipped, toy.train(None, poisoned(1e6), **WORDS))
    changed = [not torch.equal(*pair) for pair in itertools.pairwise(skipped.weights[::2])]
    assert [step for step, moved in enumerate(changed, 1) if not moved] == [BAD]
    lines = toy.lines(tmp_path / "a")
    assert [line["step"] for line in lines if "left_out" in line] == [BAD]
    assert lines == toy.lines(tmp_path / "b")


def test_a_loss_that_never_stands_out_is_not_touched(toy, tmp_path, poisoned):
    expected = toy.train(tmp_path / "a", poisoned(1.0), **WORDS)
    for how in ("skip", "rollback"):
        assert toy.same(toy.train(tmp_path / how, poisoned(1.0), on_spike=how, **WORDS), expected)
        assert toy.lines(tmp_path / how) == toy.lines(tmp_path / "a")


def test_a_run_goes_back_and_passes_over_the_data(toy, tmp_path, poisoned, caplog):
    """27 updates were begun; it goes back to 20, and its other 20 take the data that come after those 27."""
    data, model = toy.Points(), poisoned(1e6)
    toy.train(tmp_path, model, data, on_spike="rollback", **WORDS)
    order = EpochSampler(22, 4, seed=1234, micro=2).between(0, 2 * (STEPS + 7))
    assert data.read == [number for _, batch in order for number in batch]
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    lines = toy.lines(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[20]["rolled_back_to"] == 20 and "went back to step 20" in caplog.text
    assert [line.get("skipped") for line in lines] == [None] * 20 + [7] * 20
    assert not any("left_out" in line or "rolled_back_to" in line for line in lines[21:])
    epochs = [line["epoch"] for line in lines]
    assert epochs == [u // 2 for u in [*range(20), *range(27, 47)]]


def test_what_it_goes_back_to_is_the_checkpoint(toy, tmp_path, poisoned):
    """The weights of the forward after the spike are those of step 20, bit for bit."""
    model = poisoned(1e6)
    toy.train(tmp_path, model, on_spike="rollback", **WORDS)
    assert torch.equal(model.weights[2 * BAD], model.weights[40])
    assert not torch.equal(model.weights[2 * BAD], model.weights[2 * BAD - 1])


@pytest.mark.parametrize("at", [2 * BAD + 3, 2 * BAD + 25], ids=["before the next checkpoint", "after it"])
def test_a_run_that_went_back_is_resumed_exactly(toy, tmp_path, poisoned, at):
    words = WORDS | {"on_spike": "rollback"}
    expected = toy.train(tmp_path / "a", poisoned(1e6), **words)
    with pytest.raises(KeyboardInterrupt):
        toy.train(tmp_path / "b", poisoned(1e6, at), **words)
    assert toy.same(toy.train(tmp_path / "b", poisoned(1e6), **words), expected)
    assert toy.lines(tmp_path / "b") == toy.lines(tmp_path / "a")
    assert toy.same(*(weights.read(tmp_path / name / "model.safetensors") for name in ("a", "b")))


def test_without_a_checkpoint_a_spike_is_left_out(toy, tmp_path, poisoned):
    words = WORDS | {"save_interval": 1000}
    model = toy.train(tmp_path, poisoned(1e6), on_spike="rollback", **words)
    assert toy.same(model, toy.train(None, poisoned(math.nan), **words))
    assert [line["step"] for line in toy.lines(tmp_path) if "left_out" in line] == [BAD]


@pytest.mark.parametrize("factor", [1e6, math.nan])
def test_a_run_that_always_explodes_at_the_same_place_gives_up(toy, tmp_path, factor):
    class Explodes(toy.Killed):
        def forward(self, x, y):
            output = super().forward(x, y)
            return output | {"loss": output["loss"] * factor} if self.calls > 50 else output

    data = toy.Points()
    with pytest.raises(TrainingDiverged, match=f"went back to step 20 {MOST_BACK} times: lower lr"):
        toy.train(tmp_path, Explodes(-1), data, on_spike="rollback", **WORDS)
    first, again = (6, 1) if factor == 1e6 else (5 + guard.BAD_IN_A_ROW, guard.BAD_IN_A_ROW)
    assert len(data.read) == 8 * (20 + first + MOST_BACK * again)
    steps = [line["step"] for line in toy.lines(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))  # the last attempt's stay, to be looked at
    kept = weights.read(tmp_path / "checkpoints" / "step-00000020" / "rank-00000.pieces.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_going_back_does_not_count_the_seconds_twice(toy, tmp_path, poisoned, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("zoo.training.log.time.perf_counter", lambda: float(next(ticks)))  # a second for each look
    toy.train(tmp_path, poisoned(1e6), on_spike="rollback", **WORDS)
    seconds = [line["seconds"] for line in toy.lines(tmp_path, times=True)]
    steps = [after - before for before, after in itertools.pairwise(seconds)]
    assert 0 < min(steps) and max(steps) < 3 * min(steps)


def test_going_back_needs_a_run_folder():
    with pytest.raises(SettingsError, match="give a run_folder"):
        Trainer(on_spike="rollback")
