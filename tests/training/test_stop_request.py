"""Whatever asks, only asks; the answer is the same for all; after it everything is as it was."""

from __future__ import annotations

import signal
import threading

import pytest

from zoo.distributed import Channel
from zoo.errors import Suspended
from zoo.training import stop_request
from zoo.training.stop_request import StopRequest, is_ctrl_c


def test_ctrl_c_asks_once():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest(Channel()) as stop:
        assert stop.agreed() is None
        signal.raise_signal(signal.SIGINT)
        assert is_ctrl_c(stop.agreed())
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=str)
def test_a_scheduler_asks_by_a_signal(number):
    before = signal.getsignal(number)
    with StopRequest(Channel()) as stop:
        signal.raise_signal(number)
        signal.raise_signal(number)
        assert stop.agreed() == number.name
        assert not is_ctrl_c(stop.agreed())
    assert signal.getsignal(number) is before


def test_a_file_asks_and_is_taken_away(tmp_path, monkeypatch):
    monkeypatch.setattr(stop_request, "_LOOK", 0.0)
    with StopRequest(Channel(), folder=tmp_path) as stop:
        assert stop.agreed() is None
        (tmp_path / "STOP").touch()
        assert stop.agreed() == "the file STOP"
        stop.done()
    assert not (tmp_path / "STOP").exists()


def test_time_asks():
    with StopRequest(Channel(), minutes=60) as stop:
        assert stop.agreed() is None
    with StopRequest(Channel(), minutes=0) as stop:
        assert stop.agreed() == "the time limit"


def test_a_run_may_be_in_another_thread(toy, whole):
    trained = []
    thread = threading.Thread(target=lambda: trained.append(toy.train(None)))
    thread.start()
    thread.join()
    assert toy.same(trained[0], whole["state"])


def suspended_by(toy, tmp_path, ask, **changed):
    """Trains until `ask` is heard in the forward of micro-batch 10, of step 5; then to the end."""
    with pytest.raises(Suspended) as stopped:
        toy.train(tmp_path, toy.Killed(10, ask), **changed)
    assert stopped.value.code == 75
    assert "after step 5 of 12; run the same command to go on" in str(stopped.value)
    assert (tmp_path / "checkpoints" / "step-00000005" / "manifest.json").is_file()
    return toy.train(tmp_path)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "file", "simulated"])
def test_a_suspended_run_goes_on_to_the_same_weights(toy, whole, tmp_path, monkeypatch, how):
    monkeypatch.setattr(stop_request, "_LOOK", 0.0)
    asks = {
        "SIGTERM": lambda: signal.raise_signal(signal.SIGTERM),
        "SIGUSR1": lambda: signal.raise_signal(signal.SIGUSR1),
        "file": lambda: (tmp_path / "STOP").touch(),
        "simulated": lambda: None,
    }
    changed = {"simulate_suspend": 5} if how == "simulated" else {}
    assert toy.same(suspended_by(toy, tmp_path, asks[how], **changed), whole["state"])
    assert toy.lines(tmp_path) == whole["lines"]


def test_sigterm_during_a_save_does_not_spoil_it(toy, whole, tmp_path, monkeypatch):
    from zoo import weights

    write, sent = weights.write, []

    def interrupted(state, path, **words):
        write(state, path, **words)
        if "step-00000006" in str(path) and not sent:
            sent.append(path)
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "write", interrupted)
        with pytest.raises(Suspended, match="after step [67] of 12"):
            toy.train(tmp_path, async_save=False)
    assert sent and (tmp_path / "checkpoints" / "step-00000006" / "manifest.json").is_file()
    assert toy.same(toy.train(tmp_path), whole["state"])
