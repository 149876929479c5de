"""Guidance goes from the output without a prompt towards that with one, and beyond."""

from __future__ import annotations

import pytest
import torch

from zoo.generation.guidance import guided


def outputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 4, 5, 6, generator=generator), 2 * torch.randn(3, 4, 5, 6, generator=generator)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 7.5])
def test_guidance_is_u_plus_scale_times_the_difference(scale):
    u, c = outputs()
    torch.testing.assert_close(guided(u, c, scale), u + scale * (c - u), rtol=1e-5, atol=1e-5)


def test_rescaled_guidance_has_the_deviation_of_the_conditional_output_in_each_picture():
    u, c = outputs()
    c[1] *= 3  # pictures that differ: each has its own deviation
    plain, deviation = guided(u, c, 7.5), lambda x: x.flatten(1).std(1)
    assert (deviation(plain) > 2 * deviation(c)).all()
    torch.testing.assert_close(deviation(guided(u, c, 7.5, rescale=1.0)), deviation(c))
    ratio = (deviation(c) / deviation(plain)).view(3, 1, 1, 1)
    torch.testing.assert_close(guided(u, c, 7.5, rescale=0.7), 0.7 * plain * ratio + 0.3 * plain)


def test_half_precision_stays_what_it_is():
    u, c = (x.bfloat16() for x in outputs())
    assert guided(u, c, 3.0, rescale=0.5).dtype == torch.bfloat16
