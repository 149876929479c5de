"""What a pickle may do to the reader: give tensors. Whatever else it asks for is refused, and nothing of it runs."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.errors import UnreadableWeights, UnsafePickle, WeightsError
from zoo.weights import read, safe_pickle


class Storage:
    """Stands for a storage in a pickle that `dump` writes."""

    def __init__(self, key="0", count=4, kind=torch.FloatStorage):
        self.identity = ("storage", kind, key, "cpu", count)


class Calls:
    """Pickles as a call of `function` with `args`, and as `state` to be set on what that returns."""

    def __init__(self, function, *args, state=None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.reduced


def tensor(size, stride, offset=0, storage=None):
    args = (storage or Storage(), offset, size, stride, False, collections.OrderedDict())
    return Calls(torch._utils._rebuild_tensor_v2, *args)


def dump(value, protocol=2) -> bytes:
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol)
    pickler.persistent_id = lambda held: held.identity if isinstance(held, Storage) else None
    pickler.dump(value)
    return stream.getvalue()


def archive(path: Path, data: bytes, **members: bytes) -> Path:
    """A zip like torch.save's, of `data` as data.pkl and a storage 0 of four floats."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/data/0", torch.arange(4.0).numpy().tobytes())
        for name, content in members.items():
            file.writestr(f"archive/{name}", content)
    return path


@pytest.fixture
def marker(tmp_path):
    path = tmp_path / "it-ran"
    yield path
    assert not path.exists(), "the pickle was executed"


def test_a_plain_tensor_is_read(tmp_path):
    state = read(archive(tmp_path / "x.pt", dump({"w": tensor((2, 2), (1, 2))})))
    assert state["w"].tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("function", [os.system, eval, subprocess.check_call, getattr, torch.load, pickle.loads])
def test_a_call_is_refused_by_name(tmp_path, marker, function, protocol):
    source = f"open({str(marker)!r}, 'w')" if function is eval else f"touch {marker}"
    evil = {"w": tensor((4,), (1,)), "x": Calls(function, source)}
    if protocol == 0:  # the textual protocol has no persistent tuples
        evil.pop("w")
    with pytest.raises(UnsafePickle, match=rf"x\.pt.*{function.__name__}"):
        read(archive(tmp_path / "x.pt", dump(evil, protocol)))


@pytest.mark.parametrize(
    "opcodes",
    [
        b"(S'touch %s'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'touch %s'\no.",  # OBJ
        b"\x8c\x05posix\x8c\x06system\x93S'touch %s'\n\x85R.",  # STACK_GLOBAL
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nNS'touch %s'\n\x85NtR.",  # a call within an allowed call
        b"\x82\x01S'touch %s'\n\x85R.",  # EXT1, a number in a registry of classes
        b"P../../%s\n.",  # a persistent id as text
    ],
)
def test_other_opcodes_cannot_call_either(tmp_path, marker, opcodes):
    with pytest.raises(UnsafePickle):
        read(archive(tmp_path / "x.pt", opcodes.replace(b"%s", bytes(marker))))


class Setter:
    def __init__(self, path):
        self.path = str(path)

    def __setstate__(self, state):
        Path(state["path"]).touch()


@pytest.mark.parametrize(
    "evil", [lambda path: Setter(path), lambda path: pickle.dumps(Calls(os.system, f"touch {path}"))]
)
def test_what_is_named_and_not_called_stays_inert(tmp_path, marker, evil):
    """Neither a class with a setter, nor a pickle within the pickle, does anything or stands in the way."""
    path = archive(tmp_path / "x.pt", dump({"w": tensor((4,), (1,)), "x": evil(marker), "y": [os.system, eval]}))
    assert list(read(path)) == ["w"]


def test_functions_of_the_allow_list_cannot_be_altered(tmp_path):
    """BUILD sets attributes of what is on the stack, in Python's unpickler also those of functions."""
    good = {"w": tensor((4,), (1,))}
    altered = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}U\x0c__defaults__)s\x86b0" + dump(good)[2:]
    before = torch._utils._rebuild_tensor_v2.__defaults__
    read(archive(tmp_path / "x.pt", altered))
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before
    assert read(archive(tmp_path / "y.pt", dump(good)))["w"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("key", ["../../x", "/etc/passwd", "0/../0", "٣", "", "-1", 0, ("0",), "9" * 30])
def test_a_storage_key_is_a_number(tmp_path, key):
    with pytest.raises(UnsafePickle, match="storage key"):
        read(archive(tmp_path / "x.pt", dump({"w": tensor((4,), (1,), storage=Storage(key))})))


@pytest.mark.parametrize(
    "size, stride, offset",
    [
        ((5,), (1,), 0),
        ((4,), (1,), 1),
        ((2, 2), (3, 1), 0),
        ((1,), (1,), 4),
        ((), (), 4),
        ((4,), (1, 1), 0),
        ((2,), (-1,), 1),
        ((-4,), (1,), 0),
        ((4,), (1,), -1),
        ((2**62, 2**62), (0, 0), 0),
        ((2**30,), (0,), 0),
        ((0, 2**62, 2**62), (1, 1, 1), 0),
        ((2**64,), (1,), 0),
        ((4.0,), (1,), 0),
        ((True,), (1,), 0),
        ((1,) * 65, (1,) * 65, 0),
        (4, 1, 0),
        ((4,), (1,), "0"),
    ],
)
def test_a_tensor_never_reaches_beyond_its_storage(tmp_path, size, stride, offset):
    with pytest.raises(UnreadableWeights):
        read(archive(tmp_path / "x.pt", dump({"w": tensor(size, stride, offset)})))


def test_a_declared_storage_longer_than_its_bytes_does_not_help(tmp_path):
    with pytest.raises(UnreadableWeights, match="4 elements"):
        read(archive(tmp_path / "x.pt", dump({"w": tensor((9,), (1,), storage=Storage(count=9))})))


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a memo index for which an unpickler would take gigabytes
        b"\x80\x02}q\x00(X\x01\x00\x00\x00ah\x00u.",  # a dict that holds itself
        b"\x80\x04]\x94(h\x00h\x00e.",  # a list that holds itself twice
        b"\x80\x02}" + b")" + b"\x85" * 200_000 + b"Ns.",  # a key whose hash would overflow the C stack
        b"\x80\x02}" + b")" + b"q\x00h\x00\x86" * 100 + b"Ns.",  # a key whose hash would take for ever
        b"\x80\x02]" + b"q\x00]h\x00ah\x00a" * 100 + b".",  # lists of lists twice over: 2 ** 100 leaves
        b"\x80\x02}q\x00(X\x00\x00\x00\x00h\x00u.",  # the same under a name without letters
        b"\x80\x02}q\x00(X\x00\x00\x00\x00h\x00u.",  # a dict that holds itself under a name without letters
        b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".",
        dump({10**5000: tensor((4,), (1,))}),
        dump(tensor((4,), (1,))),
        b"\x80\x02\x8b\xff\xff\xff\x7f.",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes without end
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x02.",
        b"\x80\x02R.",
        b"\x80\x02t.",
        b"\x80\x02h\x05.",
        b"\x80\x02K\x01K\x02R.",
        b"\x80\x02K\x01K\x02K\x03s.",
        b"\x80\x02K\x01K\x02a.",
        b"\x80\x02K\x01)\x81.",
        b"\x80\x02}",
        b"\x80\x02\xff.",
        b"",
    ],
)
def test_a_bomb_or_a_damaged_pickle_is_an_error_and_no_crash(tmp_path, monkeypatch, data):
    monkeypatch.setattr(safe_pickle, "MAX_VALUES", 100_000)
    with pytest.raises(WeightsError):
        read(archive(tmp_path / "x.pt", data))


def test_a_checkpoint_of_lightning_gives_its_weights(tmp_path):
    """Classes that are stored by name, and hyper-parameters that are no weights, do not stand in the way."""
    checkpoint = {
        "epoch": 3,
        "state_dict": collections.OrderedDict(w=tensor((4,), (1,))),
        "callbacks": {Setter: {"best_model_score": tensor((), (), 2), "current": np.float64(0.5)}},
        "hyper_parameters": argparse.Namespace(
            path=Path("x"), sizes={1, 2}, device=torch.device("cpu"), rate=np.ones(2)
        ),
        "optimizer_states": [{"state": {0: {"exp_avg": tensor((2,), (1,))}}}],
    }
    state = read(archive(tmp_path / "x.ckpt", dump(checkpoint)))
    name = f"callbacks.{Setter.__module__}.Setter.best_model_score"
    assert state.keys() == {"state_dict.w", name, "optimizer_states.0.state.0.exp_avg"}
    assert state["state_dict.w"].tolist() == [0, 1, 2, 3]


def test_two_tensors_of_one_name_are_an_error(tmp_path):
    with pytest.raises(UnreadableWeights, match=r"two tensors are called 'a\.b'"):
        read(archive(tmp_path / "x.pt", dump({"a.b": tensor((4,), (1,)), "a": {"b": tensor((4,), (1,))}})))


def test_damage_anywhere_is_an_error_of_ours(tmp_path):
    """A wrong byte at any place of the pickle is read as another pickle, or refused; nothing else is ever raised."""
    data = dump({"w": tensor((2, 2), (1, 2)), "x": [1.5, "text", None, {"y": 2}]})
    path = tmp_path / "x.pt"
    for place in range(len(data)):
        for value in (data[place] ^ 0xFF, ord("Rbt0"[place % 4])):
            archive(path, data[:place] + bytes([value]) + data[place + 1 :])
            try:
                read(path)
            except WeightsError:
                pass
