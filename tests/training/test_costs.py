"""Operations, memory and the share of a device that a run uses, by formula."""

from __future__ import annotations

import resource
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from zoo.training.costs import Costs

CPU = torch.device("cpu")


def counted(model: nn.Module, *shape: int, possible: bool = True) -> Costs:
    costs = Costs(CPU)
    with costs.counting(shape[0], possible):
        model(torch.ones(shape))
    return costs


def test_a_sample_costs_three_forwards():
    """A linear map takes 2 operations per weight, a convolution per weight and place, and a backward two forwards."""
    linear = counted(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)), 5, 8)
    assert linear.per_sample == 3 * 2 * (8 * 16 + 16 * 4)
    assert counted(nn.Conv2d(3, 4, 2, stride=2), 7, 3, 8, 8).per_sample == 3 * 2 * (3 * 4 * 4) * 16
    assert linear.read(1e9, "fp32")["tflops"] == pytest.approx(3 * 2 * 192 * 1e9 / 1e12)


def test_only_the_first_forward_is_counted():
    costs = counted(nn.Linear(8, 8), 2, 8)
    before = costs.per_sample
    with costs.counting(2, True):
        nn.Linear(100, 100)(torch.ones(2, 100))
    assert costs.per_sample == before == 3 * 2 * 64


def test_what_cannot_be_counted_is_not_claimed():
    costs = counted(nn.Linear(8, 8), 2, 8, possible=False)
    thread = threading.Thread(target=lambda: costs.counting(2, True).__enter__())
    thread.start()
    thread.join()
    assert costs.per_sample is None
    assert costs.read(100.0, "bf16").keys() == {"memory_gb"}


def test_counting_changes_nothing(toy, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(Costs, "counting", lambda *_, **words: nullcontext())
    assert toy.same(toy.train(tmp_path), whole["state"])
    assert "tflops" not in toy.lines(tmp_path, times=True)[0]
    assert toy.lines(whole["folder"], times=True)[0]["tflops"] > 0


def test_memory_is_the_peak_of_this_process():
    held = torch.ones(1 << 22)  # 16 MB
    said = Costs(CPU).read(1.0, "fp32")["memory_gb"]
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # Linux says kilobytes
    assert said == pytest.approx(peak, abs=0.01) and said > held.nbytes / 1e9


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L40", None),  # not an L4
        ("NVIDIA RTX A1000", None),  # not an A100
        ("NVIDIA T400", None),  # not a T4
        ("Radeon VII", None),
    ],
)
def test_the_share_of_a_device_is_of_its_own_peak(monkeypatch, name, peak):
    costs = counted(nn.Linear(1000, 1000), 4, 1000)
    costs.device = torch.device("cuda")
    monkeypatch.setattr(costs, "_peak", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    line = costs.read(1e7, "bf16")
    assert line["tflops"] == 60
    assert line.get("mfu") == (peak and round(6e6 * 1e7 / peak, 4))
    assert "mfu" not in costs.read(1e7, "fp32")  # the peaks are of half precision
