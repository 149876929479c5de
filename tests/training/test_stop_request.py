"""The first Ctrl-C asks, the second interrupts, and after it all is as before."""

from __future__ import annotations

import signal
import threading

import pytest

from zoo.training.stop_request import StopRequest


def test_ctrl_c_asks_once():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.asked
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_may_be_in_another_thread(toy, whole):
    trained = []
    thread = threading.Thread(target=lambda: trained.append(toy.train(None)))
    thread.start()
    thread.join()
    assert toy.same(trained[0], whole["state"])
