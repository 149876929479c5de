"""Our reading of flax's files agrees with msgpack's own package, and damaged files are refused.

The file is written here as google/flax's serialization.py describes it: neither jax nor flax is needed.
"""

from __future__ import annotations

import msgpack
import numpy as np
import pytest
import torch

from zoo.errors import UnreadableWeights
from zoo.weights import read
from zoo.weights.msgpack_file import DTYPES, MAX_DEPTH, is_msgpack


def array(values, code=1):
    values = np.asarray(values)
    return msgpack.ExtType(code, msgpack.packb((values.shape, values.dtype.name, values.tobytes())))


def raw(size, dtype, data):
    return msgpack.ExtType(1, msgpack.packb((size, dtype, data)))


def written(path, tree):
    path.write_bytes(tree if isinstance(tree, bytes) else msgpack.packb(tree))
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "flax_model.msgpack"


def test_every_dtype_is_read_at_its_place_in_the_tree(file):
    saved = {name: torch.tensor([[0, 1, 1], [1, 0, 1]]).to(getattr(torch, name)) for name in sorted(DTYPES)}
    leaves = {name: raw((2, 3), name, bytes(tensor.view(torch.uint8).flatten())) for name, tensor in saved.items()}
    state = read(written(file, {"model": {"encoder": leaves}, "lm_head": {"kernel": leaves["float32"]}}))
    assert list(state) == [*(f"model/encoder/{name}" for name in saved), "lm_head/kernel"]
    for name, tensor in saved.items():
        read_back = state[f"model/encoder/{name}"]
        assert read_back.dtype == tensor.dtype and read_back.tolist() == tensor.tolist()


def test_arrays_of_any_shape_are_read_and_what_is_no_array_is_left_out(file):
    numbers = {str(n): n for n in (0, -1, 127, 128, -33, 200, 70_000, 2**33, -200, -70_000, -(2**33), 1.5)}
    rest = {"none": None, "yes": True, "list": [1, [2]], "text": "x" * 40, "long": "x" * 70_000, "bytes": b"x" * 300}
    rest |= {"complex": msgpack.ExtType(2, msgpack.packb((1.0, 2.0))), "numbers": numbers, "nothing": {}}
    arrays = {"scalar": array(np.float32(2.5)), "step": array(np.int32(7), code=3), "empty": array(np.zeros((0, 3)))}
    arrays["deep"] = array(np.arange(24.0).reshape(2, 3, 4))
    state = read(written(file, {"a": rest, **{f"{i}": {"x": i} for i in range(20)}, "b": arrays}))
    assert list(state) == ["b/scalar", "b/step", "b/empty", "b/deep"]
    assert state["b/scalar"].tolist() == 2.5 and state["b/step"].tolist() == 7 and state["b/empty"].shape == (0, 3)
    assert state["b/deep"].tolist() == np.arange(24.0).reshape(2, 3, 4).tolist()


def test_an_array_in_pieces_is_put_together(file):
    whole = np.arange(30.0, dtype="float32")
    pieces = {str(i): array(whole[start : start + 8]) for i, start in enumerate(range(0, 30, 8))}
    chunked = {"__msgpack_chunked_array__": True, "shape": {"0": 5, "1": 6}, "chunks": pieces}
    assert read(written(file, {"x": {"kernel": chunked}}))["x/kernel"].tolist() == whole.reshape(5, 6).tolist()
    for broken in ({"shape": {"0": 5}}, {"shape": {"1": 5}}, {"shape": 3}, {"chunks": {}}, {"chunks": {"0": 1}}):
        with pytest.raises(UnreadableWeights, match="do not fit together"):
            read(written(file, {"x": chunked | broken}))


def test_an_array_stays_on_the_pages_of_the_file_where_its_bytes_are_aligned(file):
    aligned = 0
    for spaces in range(8):
        values = np.arange(1000, dtype="float32")
        state = read(written(file, {"a" * (spaces + 1): array(values)}))
        (tensor,) = state.values()
        assert tensor.tolist() == values.tolist() and tensor.data_ptr() % 4 == 0
        before = file.read_bytes()
        tensor.zero_()
        assert file.read_bytes() == before
        aligned += tensor.untyped_storage().nbytes() == tensor.nbytes and (before.index(values.tobytes()) % 4 == 0)
    assert aligned == 2


def test_a_folder_gives_it_after_all_others(file, tmp_path):
    written(file, {"w": array([1.0])})
    assert read(tmp_path)["w"].tolist() == [1]
    torch.save({"w": torch.tensor([2.0])}, tmp_path / "pytorch_model.bin")
    assert read(tmp_path)["w"].tolist() == [2]


def nested(levels):
    return b"\x81\xa1a" * levels + b"\xc0"


GOOD = msgpack.packb({"a": {"b": raw((2,), "float32", bytes(8)), "c": [1, "two", b"three"]}})


@pytest.mark.parametrize(
    "tree, said",
    [
        (GOOD + b"\xc0", "1 bytes too many"),
        ({"a": raw((3,), "float32", bytes(8))}, "other bytes than it needs"),
        ({"a": raw((-2, -1), "float32", bytes(8))}, "other bytes"),
        ({"a": raw((True, 2), "float32", bytes(8))}, "other bytes"),
        ({"a": raw((2.0,), "float32", bytes(8))}, "other bytes"),
        ({"a": raw(2, "float32", bytes(8))}, "other bytes"),
        ({"a": raw((2,), "float32", "eight...")}, "other bytes"),
        ({"a": raw((2**47, 2**47, 0), "float32", b"")}, "impossible size|other bytes"),
        ({"a": raw((1,), "object", bytes(8))}, "dtype 'object'"),
        ({"a": raw((1,), "storage", bytes(8))}, "dtype 'storage'"),
        ({"a": raw((1,), ["float32"], bytes(4))}, "dtype"),
        ({"a": msgpack.ExtType(1, msgpack.packb((1, 2)))}, "no shape, dtype and bytes"),
        ({"a": msgpack.ExtType(1, msgpack.packb(((1,), "int8", b"x")) + b"\xc0")}, "no shape, dtype and bytes"),
        (b"\x82\xa1a\xc0\xa1a\xc0", "stands twice"),
        (b"\x82\xa1a\xc0\x01\xc0", "no name"),
        (b"\x82\xa1a\xc0\x81\xa1a\xc0\xc0", "deeper"),
        ({"a": {"b": array([1])}, "a/b": array([1])}, "two arrays"),
        (b"\x81\xa1a\xc1", "never uses"),
        (b"\x81\xa2\xff\xff\xc0", "UTF-8"),
        (b"\x81\xa1a\xdd\xff\xff\xff\xff", "truncated"),
        (b"\x81\xa1a\xc6\xff\xff\xff\xff", "truncated"),
        (nested(MAX_DEPTH + 2), "deeper"),
        (nested(200_000), "deeper"),
        ({"a": {"b": 1}}, "no tensors"),
    ],
)
def test_a_damaged_file_is_an_error(file, tree, said):
    with pytest.raises(UnreadableWeights, match=said) as error:
        read(written(file, tree))
    assert str(file) in str(error.value)


def test_a_file_cut_anywhere_is_an_error(file):
    for length in range(len(GOOD)):
        with pytest.raises(UnreadableWeights):
            read(written(file, GOOD[:length]))


def test_any_byte_may_be_damaged_and_nothing_but_an_error_comes_of_it(file):
    for place in range(len(GOOD)):
        for byte in (0x00, 0x80, 0x91, 0xC1, 0xC7, 0xD4, 0xDF, 0xFF):
            damaged = bytearray(GOOD)
            damaged[place] = byte
            try:
                read(written(file, bytes(damaged)))
            except UnreadableWeights:
                pass


def test_the_first_bytes_tell_it_from_other_formats(file):
    for count in (1, 15, 16, 70_000):
        assert is_msgpack(msgpack.packb({f"name{i}": 0 for i in range(count)})[:512])
    assert is_msgpack(msgpack.packb({"x" * 40: 0})) and is_msgpack(msgpack.packb({"x" * 300: 0}))
    for other in (
        b"",
        b"\x81",
        b"\x89PNG\r\n",
        b"\x80\x02}q\0.",
        b"\x93NUMPY",
        b"\x89HDF",
        b"\xde\0\1",
        b"{}",
        b"PK\3\4",
    ):
        assert not is_msgpack(other)
