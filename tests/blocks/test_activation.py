from __future__ import annotations

import pytest
import torch

from zoo.blocks.activation import ACTIVATIONS, quick_gelu


@pytest.mark.parametrize("grad", [True, False])
def test_quick_gelu_is_x_times_the_sigmoid_of_1_702_x(grad: bool):
    x = torch.linspace(-6, 6, 101, requires_grad=grad)
    torch.testing.assert_close(quick_gelu(x), x * torch.sigmoid(1.702 * x))


def test_the_gradient_of_quick_gelu_is_that_of_its_formula():
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(quick_gelu, x)


def test_quick_gelu_leaves_its_input_as_it_was():
    x = torch.randn(10)
    before = x.clone()
    quick_gelu(x)
    assert torch.equal(x, before)


def test_the_two_activations_differ():
    x = torch.randn(100)
    assert (ACTIVATIONS["quick_gelu"](x) - ACTIVATIONS["gelu"](x)).abs().max() > 1e-3
