from __future__ import annotations

import pytest
import torch

from zoo.metrics.codes import usage


def test_usage_counts_codes_and_perplexity_how_evenly_they_are_used():
    assert usage(torch.tensor([[0, 1], [2, 3]]), 8) == pytest.approx({"code_usage": 0.5, "code_perplexity": 4})
    assert usage(torch.zeros(5, dtype=torch.int64), 8) == pytest.approx({"code_usage": 1 / 8, "code_perplexity": 1})
    uneven = usage(torch.tensor([0, 0, 0, 1]), 2)["code_perplexity"]
    assert uneven == pytest.approx((4 / 3) ** 0.75 * 4**0.25)
