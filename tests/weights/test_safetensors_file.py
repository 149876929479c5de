"""Our reading of safetensors agrees with the format's own package, and damaged headers are refused."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from zoo.errors import UnreadableWeights
from zoo.weights import read
from zoo.weights.safetensors_file import DTYPES

FOUR = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


def written(path, header, data=bytes(16)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_every_dtype_that_the_package_writes_is_read(tmp_path):
    saved = {name: torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype) for name, dtype in DTYPES.items()}
    saved |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "one": torch.ones(1, 1)}
    save_file(saved, tmp_path / "x.safetensors", metadata={"format": "pt"})
    state = read(tmp_path / "x.safetensors")
    assert state.keys() == saved.keys()
    for name, tensor in saved.items():
        assert state[name].dtype == tensor.dtype and state[name].shape == tensor.shape
        assert state[name].tolist() == tensor.tolist()


def test_tensors_that_are_not_aligned_are_copied_to_where_they_are(tmp_path):
    path = written(tmp_path / "x.safetensors", {"a": FOUR}, torch.arange(4.0).numpy().tobytes())
    header = json.dumps({"a": FOUR})
    for spaces in range(4):
        path = written(tmp_path / "x.safetensors", (header + " " * spaces).encode(), path.read_bytes()[-16:])
        tensor = read(path)["a"]
        assert tensor.tolist() == [0, 1, 2, 3] and tensor.data_ptr() % 4 == 0


def test_a_header_whose_length_looks_like_the_start_of_a_pickle_is_no_pickle(tmp_path):
    header = json.dumps({"a": FOUR}).encode().ljust(0x0280)
    assert read(written(tmp_path / "x.safetensors", header))["a"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "header, data",
    [
        ({"a": FOUR}, bytes(15)),
        ({"a": FOUR}, bytes(17)),
        ({"a": FOUR | {"data_offsets": [4, 20]}}, bytes(20)),
        ({"a": FOUR | {"data_offsets": [16, 0]}}, bytes(16)),
        ({"a": FOUR | {"data_offsets": [-16, 0]}}, bytes(16)),
        ({"a": FOUR | {"data_offsets": [0]}}, bytes(16)),
        ({"a": FOUR | {"data_offsets": None}}, bytes(16)),
        ({"a": FOUR | {"shape": [5]}}, bytes(16)),
        ({"a": FOUR | {"shape": [-2, -2]}}, bytes(16)),
        ({"a": FOUR | {"shape": ["4"]}}, bytes(16)),
        ({"a": FOUR | {"shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}, b""),
        ({"a": FOUR | {"shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}}, b""),
        ({"a": FOUR | {"dtype": "F4"}}, bytes(16)),
        ({"a": {"shape": [4]}}, bytes(16)),
        ({"a": 1}, bytes(16)),
        ({"a": FOUR, "b": FOUR}, bytes(16)),
        (b"{" + b'"a":{' * 100_000, b""),
        (b"{not json", b""),
        (b"{}", b""),
        (json.dumps({"__metadata__": {"a": "b"}}).encode(), b""),
    ],
)
def test_a_damaged_header_is_an_error(tmp_path, header, data):
    with pytest.raises(UnreadableWeights, match=r"x\.safetensors"):
        read(written(tmp_path / "x.safetensors", header, data))


def test_a_file_cut_anywhere_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(9), "b": torch.arange(5)}, path)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with pytest.raises(UnreadableWeights):
            read(path)
