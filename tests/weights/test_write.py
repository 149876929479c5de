"""What is written, every reader reads, and a failure leaves the old file."""

from __future__ import annotations

import errno
import os
import struct
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from zoo.errors import DiskFull, WeightsError
from zoo.weights import read, write
from zoo.weights.safetensors_file import DTYPES


def test_every_dtype_and_stride_comes_back_by_our_reader_and_the_package(tmp_path):
    state = {name: torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype) for name, dtype in DTYPES.items()}
    state |= {
        "transposed": torch.randn(3, 4).t(),
        "part": torch.arange(9)[2:5],
        "expanded": torch.ones(1).expand(3, 2),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    path = tmp_path / "new folder" / "x.safetensors"
    write(state, path)
    for back in (read(path), load_file(path)):
        assert back.keys() == state.keys()
        for name, tensor in state.items():
            assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
            assert back[name].tolist() == tensor.tolist(), name


def test_every_tensor_is_aligned(tmp_path):
    write(
        {"byte": torch.ones(3, dtype=torch.uint8), "double": torch.ones(2).double(), "x": torch.ones(1)}, tmp_path / "x"
    )
    assert all(tensor.data_ptr() % tensor.dtype.itemsize == 0 for tensor in load_file(tmp_path / "x").values())
    assert (struct.unpack("<Q", (tmp_path / "x").read_bytes()[:8])[0] + 8) % 64 == 0


def test_tied_tensors_are_written_under_each_name(tmp_path):
    weight = torch.randn(3)
    write({"a": weight, "b": weight, "c": weight[1:]}, tmp_path / "x.safetensors")
    back = load_file(tmp_path / "x.safetensors")
    assert torch.equal(back["a"], weight) and torch.equal(back["b"], weight) and torch.equal(back["c"], weight[1:])


def test_metadata_is_text_and_the_rest_of_it_json(tmp_path):
    write({"a": torch.ones(1)}, tmp_path / "x", metadata={"format": "pt", "config": {"width": 3}})
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == {"format": "pt", "config": '{"width": 3}'}


def test_a_file_may_be_written_over_the_one_it_was_read_from(tmp_path):
    path = tmp_path / "x.safetensors"
    write({"a": torch.arange(5000.0), "b": torch.zeros(3)}, path)
    state = read(path)
    write({"a": state["a"]}, path)
    assert torch.equal(read(path)["a"], torch.arange(5000.0)) and state["a"][9] == 9


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, device="meta"), torch.eye(2).to_sparse(), torch.ones(2, dtype=torch.complex128)]
)
def test_what_the_format_cannot_hold_is_named(tmp_path, tensor):
    with pytest.raises(WeightsError, match="'odd one'"):
        write({"odd one": tensor}, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["writing", "flushing"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, moment):
    path = tmp_path / "x.safetensors"
    write({"a": torch.zeros(2)}, path)
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(DiskFull, match="no room left"):
        if moment == "writing":
            patch.setattr(sys.modules[write.__module__], "_bytes", full)
        else:
            patch.setattr(os, "fsync", full)
        write({"a": torch.ones(2)}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]
