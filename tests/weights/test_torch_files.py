"""torch's own files come back as torch would read them, whatever their layout."""

from __future__ import annotations

import json
import struct
import warnings
import zipfile

import pytest
import torch
from torch import nn

from zoo.errors import UnreadableWeights
from zoo.weights import read

warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.jit")
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool]
DTYPES += [torch.uint16, torch.float8_e4m3fn, torch.complex64]


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()


def content():
    base = torch.arange(12.0)
    return {
        **{f"of {dtype}": torch.tensor([[0, 1], [1, 0]]).to(dtype) for dtype in DTYPES},
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(3, 4).t(),
        "part": base[3:7],
        "every other": base[::2],
        "expanded": torch.ones(1).expand(3, 2),
        "parameter": nn.Parameter(torch.ones(2)),
    }


def rezip(path, change):
    """The archive anew, each member through change(name, bytes) -> (bytes, compression) or None to leave it out."""
    with zipfile.ZipFile(path) as old:
        members = {name: change(name, old.read(name)) for name in old.namelist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, member in members.items():
            if member is not None:
                new.writestr(name, member[0], compress_type=member[1])
    return path


def stored(name, data):
    return data, zipfile.ZIP_STORED


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saved_is_what_is_read(tmp_path, zipped, protocol):
    saved, path = content(), tmp_path / "x.bin"
    torch.save(
        {"state_dict": saved, "epoch": 3, "rates": [0.5, torch.ones(1)]},
        path,
        _use_new_zipfile_serialization=zipped,
        pickle_protocol=protocol,
    )
    state = read(path)
    assert list(state) == [f"state_dict.{name}" for name in saved] + ["rates.1"]
    for name, tensor in saved.items():
        assert same(state[f"state_dict.{name}"], tensor), name
    part, every_other = state["state_dict.part"], state["state_dict.every other"]
    part[1] = -1
    assert every_other[2] == -1, "what was saved sharing memory is read sharing memory"


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(2)
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, x):
        return self.bn1(self.conv1(x))


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = Tower()
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def forward(self, x):
        return self.visual(x) * self.logit_scale


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["script", "trace", "half"])
def test_a_torchscript_archive_gives_its_state_dict_and_runs_no_code(tmp_path, how):
    model = Whole().eval()
    if how == "trace":
        module = torch.jit.trace(model, torch.randn(1, 3, 4, 4))
    else:
        module = torch.jit.script(model)
    module = module.half() if how == "half" else module
    path = tmp_path / "x.pt"
    torch.jit.save(module, str(path))
    rezip(path, lambda name, data: None if "/code/" in name or "constants" in name else stored(name, data))
    state, wanted = read(path), module.state_dict()
    assert state.keys() == wanted.keys() and "visual.conv1.weight" in state and "visual.input_resolution" in state
    assert all(same(state[name], wanted[name]) for name in wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickled_module_gives_its_state_dict(tmp_path, zipped):
    model = Whole()
    torch.save(model, tmp_path / "encoder.pkl", _use_new_zipfile_serialization=zipped)
    state, wanted = read(tmp_path / "encoder.pkl"), model.state_dict()
    assert state.keys() == wanted.keys() and all(same(state[name], wanted[name]) for name in wanted)


def test_compressed_members_are_read(tmp_path):
    saved, path = content(), tmp_path / "x.bin"
    torch.save(saved, path)
    state = read(rezip(path, lambda name, data: (data, zipfile.ZIP_DEFLATED)))
    assert all(same(state[name], saved[name]) for name in saved)


def test_unaligned_members_are_read(tmp_path):
    """Other tools that write the zip do not align its members as torch does."""
    saved, path = {f"{i}": torch.randn(3, dtype=torch.float64) for i in range(9)}, tmp_path / "x.bin"
    torch.save(saved, path)
    state = read(rezip(path, stored))
    assert all(same(state[name], saved[name]) and state[name].data_ptr() % 8 == 0 for name in saved)


def test_byte_order_is_obeyed_and_little_when_not_stated(tmp_path):
    saved, path = content(), tmp_path / "x.bin"
    torch.save(saved, path)
    rezip(path, lambda name, data: (b"big", 0) if name.endswith("byteorder") else stored(name, data))
    foreign = torch.load(path, weights_only=True)
    state = read(path)
    for name in saved.keys() - {"of torch.uint16"}:  # which torch saves as bytes, and forgets to turn round
        raw = [t.contiguous().reshape(-1).view(torch.uint8).tolist() for t in (state[name], foreign[name])]
        assert raw[0] == raw[1], name
    rezip(path, lambda name, data: None if name.endswith("byteorder") else stored(name, data))
    state = read(path)
    assert all(same(state[name], saved[name]) for name in saved)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_cut_anywhere_is_an_error(tmp_path, zipped):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.randn(50), "b": torch.arange(9)}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for end in range(0, len(whole), 13):
        path.write_bytes(whole[:end])
        with pytest.raises(UnreadableWeights):
            read(path)


def test_a_storage_of_another_length_than_the_pickle_says_is_an_error(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(50)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(struct.pack("<q", 50), struct.pack("<q", 40)))
    with pytest.raises(UnreadableWeights, match="damaged"):
        read(path)


def test_a_missing_member_is_named(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(2), "b": torch.ones(3)}, path)
    rezip(path, lambda name, data: None if name.endswith("data/1") else stored(name, data))
    with pytest.raises(UnreadableWeights, match="lacks its member data/1"):
        read(path)


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(10_000_000, dtype=torch.uint8)}, path)
    rezip(path, lambda name, data: (data * 9 if name.endswith("data/0") else data, zipfile.ZIP_DEFLATED))
    with pytest.raises(UnreadableWeights, match="unpacks to"):
        read(path)


def test_a_declared_size_that_lies_is_an_error(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.zeros(1000)}, path)
    data = bytearray(rezip(path, lambda name, data: (data, zipfile.ZIP_DEFLATED)).read_bytes())
    entry = data.rindex(b"data/0") - 46  # in the central directory
    struct.pack_into("<I", data, entry + 24, 4_000_000_000 - 1)
    path.write_bytes(data)
    with pytest.raises(UnreadableWeights):
        read(path)


def test_damage_to_the_directory_of_the_archive_is_an_error_of_ours(tmp_path):
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(2)}, path)
    whole = path.read_bytes()
    for place in range(whole.index(b"PK\1\2"), len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            state = read(path)
            assert state.keys() == {"a"}
        except UnreadableWeights:
            pass


def test_another_zip_is_not_taken_for_weights(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as file:
        file.writestr("config.json", json.dumps({}))
    with pytest.raises(UnreadableWeights, match="none that torch wrote"):
        read(tmp_path / "x.pt")
