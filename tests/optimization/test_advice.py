from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.optimization.advice import advice_for


def test_advice_fits_the_hardware_the_numbers_and_the_gradients(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("zoo.optimization.advice.has_bf16", lambda device: True)
    monkeypatch.setattr("zoo.optimization.advice.has_tf32", lambda device: True)
    model = nn.Linear(2, 2)
    words = ["fused=True", "torch.bfloat16", '"high"']
    assert all(word in line for word, line in zip(words, advice_for(model), strict=True))
    assert advice_for(model.requires_grad_(False).bfloat16()) == ()


def test_the_advised_lines_run():
    model = nn.Linear(2, 2)
    for line in advice_for(model):
        eval(line, {"torch": torch, "model": model})
