from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.optimization.measure import Measure, each_tensor, furthest, made, untouched
from zoo.optimization.replacements import convolutions


def net(*extra: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), *extra)


def test_measuring_leaves_the_model_and_the_random_numbers_as_they_were():
    model = net(nn.Dropout(0.5))
    model[1].eval()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    gradients, buffers = [p.grad.clone() for p in model.parameters()], list(map(id, model.buffers()))
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    model[1].train()
    measure = Measure(model, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    found = convolutions(model, None)
    measure.distance(found.make), measure.gain(found.make), measure.probe()
    assert model[1].training
    model[1].eval()
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert list(map(id, model.buffers())) == buffers
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
    assert all(type(m) is nn.Conv2d for m in (model[0], model[3]))


def test_a_model_that_draws_at_random_in_training_is_compared_in_eval_mode():
    x = torch.randn(2, 3, 8, 8)
    assert Measure(net(), x).as_trained
    random = Measure(net(nn.Dropout(0.5)), x)
    assert not random.as_trained
    assert random.distance(convolutions(random.model, None).make) < 1e-5


@pytest.mark.parametrize("what", ["output", "gradient"])
def test_distance_sees_outputs_and_gradients(what: str):
    layer = nn.Linear(3, 3)
    measure = Measure(layer, torch.randn(2, 3))

    class Other(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return y + 0.01 if what == "output" else y + 0.01 * (y - y.detach())

    def make():
        layer.__class__ = Other
        return lambda: setattr(layer, "__class__", nn.Linear)

    assert measure.distance(make) > 1e-3
    assert type(layer) is nn.Linear


def test_gradients_that_only_rounding_moves_count_as_equal():
    class Kink(nn.Module):
        """Just left of a ReLU's kink, by less than float32 rounds."""

        def __init__(self):
            super().__init__()
            self.weight, self.shift = nn.Parameter(torch.ones(1)), nn.Buffer(torch.ones(1))

        def forward(self, x):
            return torch.relu(self.weight - self.shift - 1e-9) * x

    class Rounded(Kink):
        def forward(self, x):
            return torch.relu(self.weight - self.shift - 1e-9 + torch.finfo(x.dtype).eps) * x

    model = Kink()
    kept = [(id(t), t.data_ptr(), t.dtype) for t in (model.weight, model.shift)]
    measure = Measure(model, torch.ones(1))

    def make():
        model.__class__ = Rounded
        return lambda: setattr(model, "__class__", Kink)

    with made(make):
        assert furthest(measure.plain[1], measure._observe()[1]) >= 1  # in float32, all of the gradient
    assert measure.distance(make) < 1e-5
    assert [(id(t), t.data_ptr(), t.dtype) for t in (model.weight, model.shift)] == kept


def test_gain_is_the_time_before_over_the_time_after():
    class Slow(nn.Linear):
        def forward(self, x):
            return sum(super(Slow, self).forward(x) for _ in range(20))

    layer = Slow(64, 64).eval()

    def make():
        layer.__class__ = nn.Linear
        return lambda: setattr(layer, "__class__", Slow)

    assert Measure(layer, torch.randn(64, 64)).gain(make) > 3


def test_the_state_comes_back_after_an_error_too():
    model, random = net(), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError), untouched(model, torch.device("cpu")):
        model.eval()(torch.rand(1, 3, 8, 8))
        model[1].running_mean.fill_(9)
        raise ZeroDivisionError
    assert model.training and torch.equal(torch.get_rng_state(), random)
    assert model[1].running_mean.abs().max() == 0


def test_a_float16_model_is_held_to_what_float16_can_say():
    assert Measure(nn.Linear(2, 2), torch.ones(1, 2)).tolerance == 1e-5
    assert Measure(nn.Linear(2, 2).bfloat16(), torch.ones(1, 2).bfloat16()).tolerance == 2e-2


def test_furthest_is_relative_and_knows_infinities():
    one = torch.tensor([1.0, float("inf"), float("nan")])
    assert furthest([one], [one.clone()]) == 0
    assert furthest([torch.tensor([100.0])], [torch.tensor([101.0])]) == pytest.approx(0.01)
    assert furthest([one], [torch.ones(3)]) == furthest([one], []) == float("inf")


def test_a_batch_keeps_its_form():
    x = torch.ones(1)
    assert each_tensor({"a": x, "n": (x, [3, None])}, lambda t: t + 1) == {"a": 2, "n": (2, [3, None])}
