"""Scales of residual branches: none shows in the gradients, each moves by its own overflows, and a run goes on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from zoo.errors import CheckpointError
from zoo.training.branch_scaling import DIVISOR, GROWTH, LEAST, MOST, PATIENCE, START, BranchScaler


class Stream(nn.Module):
    """Three residual branches: a norm, and two linear layers in fp16 if `half`."""

    def __init__(self, half: bool):
        super().__init__()
        torch.manual_seed(0)
        self.half_precision = half
        self.branches = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for branch in self.branches:
            with torch.autocast("cpu", torch.float16, enabled=self.half_precision):
                out = branch(x)
            x = x + out
        return x

    def scaler(self, replicas: int = 1) -> BranchScaler:
        return BranchScaler([list(branch) for branch in self.branches], replicas)


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def gradients(model: Stream, size: float) -> dict[str, Tensor]:
    model.zero_grad()
    (size * model(X).square().mean()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def scaled(model: Stream, scaler: BranchScaler, size: float) -> tuple[bool, dict[str, Tensor]]:
    gradients(model, size)
    return scaler.unscale(), {name: p.grad for name, p in model.named_parameters()}


def test_where_nothing_overflows_the_gradients_are_those_of_fp32_without_scales():
    expected = gradients(Stream(half=False), 1.0)
    model = Stream(half=False)
    finite, found = scaled(model, model.scaler(), 1.0)
    assert finite
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)


def test_small_gradients_survive_fp16_which_loses_them_without_scales():
    size = 2.0**-17
    expected = gradients(Stream(half=False), size)
    model = Stream(half=True)
    finite, found = scaled(model, model.scaler(), size)
    lost = gradients(Stream(half=True), size)
    assert finite
    error = {way: max(float((g[n] - e).norm() / e.norm()) for n, e in expected.items()) for way, g in
             {"scaled": found, "lost": lost}.items()}  # fmt: skip
    assert error["scaled"] < 0.01 < 0.05 < error["lost"]


def test_a_branch_that_overflows_is_scaled_down_alone_and_spoils_no_other():
    model = Stream(half=True)
    scaler = model.scaler()
    expected = gradients(Stream(half=False), 1.0)
    scaler.scales[1] = 2.0**24  # beyond what fp16 holds
    finite, found = scaled(model, scaler, 1.0)
    assert not finite
    assert scaler.scales == [START * GROWTH, 2.0**24 / DIVISOR, START * GROWTH]
    spoilt = {name for name, gradient in found.items() if not gradient.isfinite().all()}
    assert spoilt and all(name.startswith("branches.1.") for name in spoilt)
    last = "branches.2.1.weight"  # nearer to the loss: it has seen nothing of the branch before it
    assert (found[last] - expected[last]).norm() < 0.01 * expected[last].norm()


def test_a_scale_falls_once_in_a_while_and_stays_within_its_bounds():
    scaler = Stream(half=True).scaler(replicas=2)
    assert scaler.scales == [2 * START] * 3
    for _ in range(PATIENCE + 1):
        scaler._move(0, False)
    assert scaler.scales[0] == pytest.approx(2 * START / DIVISOR)
    scaler._move(0, False)
    assert scaler.scales[0] == pytest.approx(2 * START / 2)
    scaler.scales = [2 * LEAST, 2 * MOST, 2 * START]
    scaler.waited = [PATIENCE] * 3
    for number, good in ((0, False), (1, True), (2, True)):
        scaler._move(number, good)
    assert scaler.scales == [2 * LEAST, 2 * MOST, 2 * START * GROWTH]


def test_scales_are_kept_and_given_back():
    model = Stream(half=True)
    first, second = model.scaler(), Stream(half=True).scaler()
    first.scales[2] = 2.0**24
    scaled(model, first, 1.0)
    second.load_state_dict(first.state_dict())
    for scaler in (first, second):
        for number in range(3):
            scaler._move(number, number != 2)
    assert first.state_dict() == second.state_dict() != Stream(half=True).scaler().state_dict()
    with pytest.raises(CheckpointError, match="3 gradient scales, for a model of 1"):
        BranchScaler([[nn.Linear(1, 1)]]).load_state_dict(first.state_dict())
