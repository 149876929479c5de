"""A mapped file costs nothing until it is touched, is never changed, and is given back tensor by tensor."""

from __future__ import annotations

import gc
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zoo.weights import read

MEGABYTE = 2**20


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_writing_to_a_tensor_changes_neither_the_file_nor_another_reading(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    saved = {"a": torch.arange(5000.0), "b": torch.arange(5000)}
    save_file(saved, path) if suffix == ".safetensors" else torch.save(saved, path)
    before = path.read_bytes()
    state = read(path)
    state["a"].add_(1)
    state["b"].zero_()
    assert path.read_bytes() == before
    assert torch.equal(read(path)["a"], saved["a"]) and torch.equal(state["a"], saved["a"] + 1)


def test_a_tensor_that_dies_takes_nothing_of_its_neighbours(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({name: torch.zeros(9001) for name in "abcd"}, path)
    state = read(path)
    for name in "bd":
        state[name].fill_(7)
    for name in "ac":
        del state[name]
    assert state["b"].eq(7).all() and state["d"].eq(7).all()


def test_what_is_not_aligned_is_as_private(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.arange(50.0)}, path, _use_new_zipfile_serialization=False)
    before = path.read_bytes()
    read(path)["a"].zero_()
    assert path.read_bytes() == before


def resident() -> int:
    """Bytes of this process that lie in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident pages by /proc")
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_memory_is_taken_by_touching_and_given_back_when_a_tensor_dies(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    saved = {"a": torch.ones(4 * MEGABYTE), "b": torch.ones(4 * MEGABYTE)}
    save_file(saved, path) if suffix == ".safetensors" else torch.save(saved, path)
    del saved
    gc.collect()
    before = resident()
    state = read(path)
    assert resident() - before < 4 * MEGABYTE
    assert state["a"].sum() + state["b"].sum() == 8 * MEGABYTE
    assert resident() - before > 28 * MEGABYTE
    state["b"].mul_(3)
    del state["a"]
    assert resident() - before < 20 * MEGABYTE
    assert state["b"].sum() == 12 * MEGABYTE, "its neighbour's pages went with it"


def test_tensors_outlive_the_file_and_what_read_them(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(9000.0)}, path)
    held = []
    thread = threading.Thread(target=lambda: held.append(read(path)["a"][10:20]))
    thread.start()
    thread.join()
    path.unlink()
    gc.collect()
    assert held[0].tolist() == list(range(10, 20))
