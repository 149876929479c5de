"""A bare pickle of NumPy arrays is read as data: the same numbers as NumPy's, and nothing runs."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from zoo.errors import UnreadableWeights, UnsafePickle
from zoo.weights import read

RNG = np.random.default_rng(0)
ARRAYS = {
    "float32": RNG.standard_normal((2, 3, 4)).astype(np.float32),
    "float16": RNG.standard_normal(5).astype(np.float16),
    "big-endian": RNG.standard_normal((2, 2)).astype(">f4"),
    "by columns": np.asfortranarray(RNG.standard_normal((2, 3))),
    "int64": np.arange(6).reshape(3, 2),
    "bool": np.array([True, False]),
    "scalar": np.array(7.0, dtype=np.float32),
    "empty": np.zeros((0, 3), dtype=np.float32),
}


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_come_back_as_tensors_by_dotted_name(tmp_path, protocol):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps({"VGG16_0": {"Conv_0": ARRAYS}, "step": 3, "name": "x"}, protocol))
    found = read(path)
    assert found.keys() == {f"VGG16_0.Conv_0.{name}" for name in ARRAYS}
    for name, array in ARRAYS.items():
        tensor = found[f"VGG16_0.Conv_0.{name}"]
        assert tensor.is_contiguous()
        assert tensor.numpy().dtype == array.dtype.newbyteorder("=")
        assert np.array_equal(tensor.numpy(), array)


def test_a_tensor_is_its_own_and_may_be_written_to(tmp_path):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps({"x": np.ones(3, dtype=np.float32)}))
    read(path)["x"].add_(1)
    assert read(path)["x"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "array", [np.array(["text"]), np.array([object], dtype=object), np.array([1 + 1j]), np.zeros(2, dtype="f4,i4")]
)
def test_an_array_of_no_plain_numbers_is_refused(tmp_path, array):
    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps({"x": array}))
    with pytest.raises((UnreadableWeights, UnsafePickle)):
        read(path)


def test_an_array_with_fewer_numbers_than_its_shape_is_damaged(tmp_path):
    path = tmp_path / "weights.ckpt"
    honest = pickle.dumps({"x": np.zeros((7, 1), dtype=np.float32)}, 4)
    path.write_bytes(honest.replace(b"K\x07K\x01", b"K\x07K\x02"))
    with pytest.raises(UnreadableWeights, match=r"28 bytes for \(7, 2\)"):
        read(path)


def test_arrays_beside_the_tensors_of_a_checkpoint_are_still_left_out(tmp_path):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"w": torch.ones(2)}, "history": np.ones(3)}, path)
    assert list(read(path)) == ["state_dict.w"]


def test_a_call_beside_arrays_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    path = tmp_path / "weights.ckpt"
    path.write_bytes(pickle.dumps({"x": np.ones(3), "y": Evil()}))
    with pytest.raises(UnsafePickle, match="builtins.print"):
        read(path)
