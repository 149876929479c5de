"""What was written comes back whole, in any split, or the damage is named."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zoo import distributed, weights
from zoo.distributed import Channel
from zoo.errors import CheckpointError, DiskFull, WeightsMismatch
from zoo.training import checkpoint
from zoo.training.checkpoint import Checkpoint, Snapshot, export, own_share
from zoo.training.engines.base import Piece

DTYPES = (torch.float32, torch.bfloat16, torch.int64)


def random_state(generator: random.Random) -> dict[str, Tensor]:
    """Tensors of 0 to 3 dimensions, some without a number, of each dtype."""
    torch.manual_seed(generator.randrange(1 << 30))
    state = {"scalar": torch.randn(()), "empty": torch.empty(0, 3)}
    for number in range(6):
        shape = [generator.randrange(1, 9) for _ in range(generator.randrange(0, 4))]
        state[f"layer.{number}"] = (100 * torch.randn(shape)).to(generator.choice(DTYPES))
    return state


def split(tensor: Tensor, parts: int, generator: random.Random) -> list[Piece]:
    """The tensor cut anywhere into so many pieces, some of them empty."""
    cuts = sorted(generator.randrange(tensor.numel() + 1) for _ in range(parts - 1))
    bounds = zip([0, *cuts], [*cuts, tensor.numel()], strict=True)
    return [Piece(tensor.reshape(-1)[first:last].clone(), tuple(tensor.shape), first) for first, last in bounds]


class OneRank:
    """The channel of rank `number` of `world_size`, which hears what is in `heard`, then only itself."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, world_size: int, *heard: list):
        monkeypatch.setattr(distributed, "rank", lambda: number)
        monkeypatch.setattr(distributed, "world_size", lambda: world_size)
        self.heard = list(heard)

    def exchange(self, value=None) -> list:
        return self.heard.pop(0) if self.heard else [value]


class AllRanks:
    """The channel of rank 0, which does the writing of the others too, when it hears of them."""

    def __init__(self, snapshots: list[Snapshot]):
        self.snapshots, self.aside = snapshots, None

    def exchange(self, value=None) -> list:
        if isinstance(value, str):
            self.aside = Path(value)
        if not isinstance(value, dict):
            return [value] * len(self.snapshots)
        rows = [checkpoint._attempt(self.aside, rank, snap) for rank, snap in enumerate(self.snapshots) if rank]
        return [value, *rows]


def write(folder: Path, shards: list[dict], shared: dict | None = None) -> Checkpoint:
    """The checkpoint of as many ranks as there are shards, {kind: {name: piece}} each, opened by one process."""
    owns = [{"engine": {"numbers": {str(rank): 1}}, "seen": rank} for rank in range(len(shards))]
    snapshots = [Snapshot(pieces, own, shared or {"step": 3}) for pieces, own in zip(shards, owns, strict=True)]
    checkpoint.write(folder, snapshots[0], AllRanks(snapshots))
    return Checkpoint(folder, Channel())


@pytest.fixture
def small(tmp_path) -> Path:
    """A checkpoint of one process, with a file of each kind."""
    torch.manual_seed(0)
    pieces = {"weights": {"a": Piece(torch.randn(3, 4), (3, 4))}, "exp_avg": {"a": Piece(torch.randn(3, 4), (3, 4))}}
    own = {"engine": {"numbers": {"a": {"step": torch.tensor(3.0)}}}, "rng": torch.arange(40)}
    folder = tmp_path / "step-00000003"
    checkpoint.write(folder, Snapshot(pieces, own, {"step": 3, "client": torch.ones(2)}), Channel())
    return folder


FILES = ["rank-00000.json", "rank-00000.pieces.safetensors", "rank-00000.safetensors", "state.json"]
FILES += ["state.safetensors", "manifest.json"]


def flip(file: Path, byte: int, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[byte] ^= 1 << bit
    file.write_bytes(data)


# --- splits ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(8))
def test_pieces_split_anyhow_come_back_whole_and_as_any_other_split(tmp_path, seed):
    generator = random.Random(seed)
    state, parts, others = random_state(generator), generator.randrange(1, 5), generator.randrange(1, 5)
    cut = {name: split(tensor, parts, generator) for name, tensor in state.items()}
    shards = [{"weights": {name: pieces[rank] for name, pieces in cut.items()}} for rank in range(parts)]
    found = write(tmp_path / "step", shards)
    assert found.names("weights") == state.keys()
    for name, tensor in state.items():
        whole = found.tensor("weights", name)
        assert whole.dtype == tensor.dtype and whole.shape == tensor.shape and torch.equal(whole, tensor)
        for expected in split(tensor, others, generator):
            into = Piece(torch.zeros_like(expected.values), expected.shape, expected.start)
            found.fill("weights", name, into)
            assert torch.equal(into.values, expected.values)


def test_what_is_filled_need_not_lie_in_a_row(tmp_path):
    expected, into = torch.randn(4, 6), torch.zeros(6, 4).T
    found = write(tmp_path / "step", [{"weights": {"a": Piece(expected, (4, 6))}}])
    found.fill("weights", "a", Piece(into, (4, 6)))
    assert torch.equal(into, expected)


def test_a_hole_is_not_filled_with_nothing(tmp_path):
    found = write(tmp_path / "step", [{"weights": {"a": Piece(torch.ones(3), (8,), 2)}}])
    found.fill("weights", "a", Piece(torch.zeros(2), (8,), 3))
    for piece in (Piece(torch.zeros(8), (8,)), Piece(torch.zeros(2), (8,), 1), Piece(torch.zeros(2), (8,), 6)):
        with pytest.raises(CheckpointError, match=r"of \d numbers of weights/a"):
            found.fill("weights", "a", piece)


def test_a_foreign_shape_is_of_another_model(small):
    found = Checkpoint(small, Channel())
    with pytest.raises(WeightsMismatch, match=r"a is \(3, 4\) there and \(4, 3\) here"):
        found.fill("weights", "a", Piece(torch.zeros(4, 3), (4, 3)))


def test_each_rank_gets_its_own_and_all_get_the_shared(tmp_path, monkeypatch):
    shards = [{"weights": {"a": piece}} for piece in split(torch.ones(8), 3, random.Random(0))]
    write(tmp_path / "step", shards, {"step": 7, "rows": [torch.ones(2)]})
    for rank in range(4):
        with monkeypatch.context() as patch:
            found = Checkpoint(tmp_path / "step", OneRank(patch, rank, 4))
        assert found.world_size == 3
        assert (found.own and found.own["seen"]) == (rank if rank < 3 else None)
        assert found.shared["step"] == 7 and torch.equal(found.shared["rows"][0], torch.ones(2))
        assert found.engine["numbers"] == {"0": 1, "1": 1, "2": 1}


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_what_all_hold_is_written_once_and_shared_evenly(world_size):
    generator = random.Random(world_size)
    sizes = {f"{number}": generator.randrange(0, 50) for number in range(40)}
    pieces = {kind: {n: Piece(torch.zeros(size), (size,)) for n, size in sizes.items()} for kind in ("a", "b")}
    shares = [own_share(pieces, rank, world_size) for rank in range(world_size)]
    written = [(kind, name) for share in shares for kind, named in share.items() for name in named]
    assert sorted(written) == sorted((kind, name) for kind, named in pieces.items() for name in named)
    loads = [sum(p.values.numel() for named in share.values() for p in named.values()) for share in shares]
    assert max(loads) - min(loads) < 50


# --- damage ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_seen_and_its_file_named(small, name):
    assert sorted(path.name for path in small.iterdir()) == sorted(FILES)
    file, generator = small / name, random.Random(1)
    size = file.stat().st_size
    places = range(size) if name == "manifest.json" else [0, size - 1, *generator.sample(range(size), 20)]
    for byte in places:
        bit = generator.randrange(8)
        flip(file, byte, bit)
        with pytest.raises(CheckpointError, match=name):
            Checkpoint(small, Channel())
        flip(file, byte, bit)
    Checkpoint(small, Channel())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["truncated", "empty", "missing", "longer"])
def test_a_file_that_is_not_whole_is_named(small, name, how):
    file = small / name
    if how == "missing":
        file.unlink()
    elif how == "longer":
        file.write_bytes(file.read_bytes() + b"x")
    else:
        os.truncate(file, file.stat().st_size // 2 if how == "truncated" else 0)
    with pytest.raises(CheckpointError, match=name):
        Checkpoint(small, Channel())


@pytest.mark.parametrize(
    "edit",
    [
        lambda manifest: manifest | {"world_size": 2},
        lambda manifest: manifest | {"files": {}},
        lambda manifest: manifest | {"more": 1},
        lambda manifest: {},
        lambda manifest: [],
    ],
)
def test_an_edited_manifest_is_not_believed(small, edit):
    file = small / "manifest.json"
    file.write_text(json.dumps(edit(json.loads(file.read_text()))))
    with pytest.raises(CheckpointError, match="step-00000003: manifest.json"):
        Checkpoint(small, Channel())


def test_a_checkpoint_of_a_later_format_is_named(small, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(CheckpointError, match="manifest.json.*format 2.*reads 1"):
        Checkpoint(small, Channel())


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_hears_of_damage_that_another_found(small, monkeypatch, rank):
    channel = OneRank(monkeypatch, rank, 2, [None, "state.json is missing"])
    with pytest.raises(CheckpointError, match="state.json is missing"):
        Checkpoint(small, channel)


def test_ranks_share_the_checking(small, monkeypatch):
    """Each file is read by one of them, since all hear what it finds."""
    read, checksum = [], checkpoint.checksum
    monkeypatch.setattr(checkpoint, "checksum", lambda path: read.append(path.name) or checksum(path))
    for rank in range(3):
        with monkeypatch.context() as patch:
            Checkpoint(small, OneRank(patch, rank, 3))
    assert sorted(read) == sorted(set(FILES) - {"manifest.json"})


# --- writing that fails ----------------------------------------------------------------------------------------------
def failing(error: Exception, after: int):
    """As weights.write, but the file after so many others raises."""
    write, left = weights.write, [after]

    def limited(state, path, **words):
        left[0] -= 1
        if left[0] < 0:
            raise error
        write(state, path, **words)

    return limited


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_write_that_fails_leaves_nothing_and_keeps_what_was_there(small, monkeypatch, after):
    snapshot = Snapshot(
        {"weights": {"a": Piece(torch.zeros(3, 4), (3, 4))}}, {"engine": None, "r": torch.ones(1)}, {"c": torch.ones(1)}
    )
    for folder in (small, small.with_name("step-00000004")):
        monkeypatch.setattr(weights, "write", failing(OSError(errno.ENOSPC, "No space left on device"), after))
        with pytest.raises(DiskFull):
            checkpoint.write(folder, snapshot, Channel())
        monkeypatch.undo()
    assert list(small.parent.iterdir()) == [small]
    assert Checkpoint(small, Channel()).shared["step"] == 3


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), DiskFull),
        (OSError(errno.EIO, "Input/output error"), CheckpointError),
        (CheckpointError("state.client is a socket"), CheckpointError),
    ],
)
def test_a_rank_tells_the_others_that_it_could_not_write(tmp_path, monkeypatch, error, raised):
    """They wait for it: whatever it meets, it must come to where they are."""
    channel = OneRank(monkeypatch, 0, 2)
    snapshot = Snapshot({"weights": {"a": Piece(torch.zeros(2), (2,))}}, {"engine": None}, {})
    monkeypatch.setattr(weights, "write", failing(error, 0))
    with pytest.raises(raised, match=f"step-00000001 could not be written by rank 0: .*{error.args[-1]}"):
        checkpoint.write(tmp_path / "step-00000001", snapshot, channel)
    assert list(tmp_path.iterdir()) == []


def test_the_other_ranks_raise_what_one_met(tmp_path, monkeypatch):
    outcomes = [{"state.json": [1, 2]}, {"error": "No space left", "full": True}]
    channel = OneRank(monkeypatch, 1, 2, [str(tmp_path), None], outcomes)
    snapshot = Snapshot({"weights": {"a": Piece(torch.zeros(2), (2,))}}, {"engine": None}, {})
    with pytest.raises(DiskFull, match="by rank 1: No space left"):
        checkpoint.write(tmp_path / "step-00000001", snapshot, channel)
    assert not (tmp_path / "state.json").exists()  # which is rank 0's to write


# --- whole weights ---------------------------------------------------------------------------------------------------
NAMES = {"embed.weight": "embed.weight", "out.weight": "embed.weight", "count": "count"}


@pytest.mark.parametrize("whole", [True, False])
def test_every_name_of_tied_weights_is_exported_in_fp32(tmp_path, whole):
    embed, count = torch.randn(4, 3).bfloat16(), torch.tensor(5)
    pieces = {"embed.weight": Piece(embed, (4, 3)), "count": Piece(count, ())}
    export(pieces, NAMES, tmp_path / "model.safetensors", Channel(), whole=whole)
    found = weights.read(tmp_path / "model.safetensors")
    assert found.keys() == NAMES.keys()
    for name in ("embed.weight", "out.weight"):
        assert found[name].dtype == torch.float32 and torch.equal(found[name], embed.float())
    assert found["count"].dtype == torch.int64 and found["count"] == 5
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_disk_that_is_full_at_the_export_is_said_and_keeps_the_old_file(tmp_path, monkeypatch, whole):
    file, pieces = tmp_path / "model.safetensors", {"a": Piece(torch.ones(2), (2,))}
    export(pieces, {"a": "a"}, file, Channel(), whole=whole)
    monkeypatch.setattr(weights, "write", failing(DiskFull("no room left"), 0 if whole else 1))
    with pytest.raises(DiskFull, match="no room left"):
        export({"a": Piece(torch.zeros(2), (2,))}, {"a": "a"}, file, Channel(), whole=whole)
    assert torch.equal(weights.read(file)["a"], torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
