"""Record files: the published bytes, all-or-nothing writing, and no damage that goes unnoticed."""

from __future__ import annotations

import errno
import os
import pickle
import random
import runpy
import signal
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from zoo.data.records import RecordReader, RecordWriter
from zoo.errors import BadRecords, DiskFull, EmptyDataset, SettingsError, UnfinishedRecords

ROOT = Path(__file__).parents[2]
GOLDEN = [b"hello", b"", bytes(range(256))]
# written by the original C++ writer (ffrecord 1.4.0)
GOLDEN_FILE = (
    bytes.fromhex(
        "f697c67c 0300000000000000 86a61036 00000000 738c0529 3000000000000000 3500000000000000 3500000000000000"
    )
    + b"hello"
    + bytes(range(256))
)
GOLDEN_EMPTY = bytes.fromhex("69df2265 0000000000000000")


def write(path: Path, samples: list) -> Path:
    with RecordWriter(path, len(samples)) as writer:
        for sample in samples:
            writer.write_one(sample)
    return path


def read_all(source, check: str = "always") -> list[bytes]:
    with RecordReader(source, check) as reader:
        return [bytes(reader.read_one(i)) for i in range(len(reader))]


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    path = tmp_path / "golden.ffr"
    path.write_bytes(GOLDEN_FILE)
    return path


# --- the format ------------------------------------------------------------------------------------------------------
def test_writer_gives_the_bytes_of_the_original(tmp_path):
    assert write(tmp_path / "a.ffr", GOLDEN).read_bytes() == GOLDEN_FILE
    assert write(tmp_path / "b.ffr", []).read_bytes() == GOLDEN_EMPTY


def test_reader_reads_the_bytes_of_the_original(golden, tmp_path):
    assert read_all(golden) == GOLDEN
    reader = RecordReader(golden)
    assert reader.get_offsets().tolist() == [48, 53, 53, 309]
    assert reader.get_checksums().tolist() == [0x3610A686, 0, 0x29058C73]
    (tmp_path / "empty.ffr").write_bytes(GOLDEN_EMPTY)
    assert len(RecordReader(tmp_path / "empty.ffr")) == 0


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_what_was_written_is_read(tmp_path, count):
    rng = random.Random(count)
    samples = [rng.randbytes(rng.choice((0, 1, 3, 5000))) for _ in range(count)]
    assert read_all(write(tmp_path / "a.ffr", samples)) == samples


def test_samples_are_all_bytes_of_any_buffer(tmp_path):
    grid = np.arange(12, dtype="<i8").reshape(3, 4)
    odd = [bytearray(b"ab"), memoryview(b"cd"), grid, grid[:, ::2], grid.astype(">i4"), np.zeros((0, 3)), grid.T]
    assert read_all(write(tmp_path / "a.ffr", odd)) == [
        b"ab",
        b"cd",
        grid.tobytes(),
        grid[:, ::2].tobytes(),
        grid.astype(">i4").tobytes(),
        b"",
        grid.T.tobytes(),
    ]


def test_files_of_the_oldest_version_have_no_header_checksum_and_are_read(golden):
    golden.write_bytes(bytes(4) + GOLDEN_FILE[4:])
    assert read_all(golden) == GOLDEN


# --- finding samples -------------------------------------------------------------------------------------------------
def test_files_are_numbered_through_and_a_folder_is_sorted(tmp_path):
    write(tmp_path / "b.ffr", [b"2", b"3"])
    write(tmp_path / "a.ffr", [b"0", b"1"])
    write(tmp_path / "aa.ffr", [])
    (tmp_path / "notes.txt").write_text("no record file")
    assert read_all(tmp_path) == [b"0", b"1", b"2", b"3"]
    assert read_all([tmp_path / "b.ffr", str(tmp_path / "a.ffr")]) == [b"2", b"3", b"0", b"1"]
    reader = RecordReader(tmp_path)
    assert [bytes(s) for s in reader.read([3, 0, 3, -1])] == [b"3", b"0", b"3", b"3"]
    assert reader.name(2) == f"{tmp_path / 'b.ffr'}, sample 0"


def test_numbers_count_as_in_a_list(golden):
    reader = RecordReader(golden)
    assert bytes(reader.read_one(-3)) == b"hello" and bytes(reader.read_one(np.int64(0))) == b"hello"
    for i in (3, -4, 2**40):
        with pytest.raises(IndexError, match=f"sample {i} of 3"):
            reader.read_one(i)


def test_samples_are_read_only_and_outlive_the_reader(golden):
    with RecordReader(golden) as reader:
        sample = reader.read_one(0)
    assert sample.readonly and bytes(sample) == b"hello"


@pytest.mark.parametrize("check", ["always", "first", "never"])
def test_a_pickled_reader_reads_on_from_another_folder(golden, check, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(golden.parent)
    pickled = pickle.dumps(RecordReader("golden.ffr", check))
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    again = pickle.loads(pickled)
    assert again.check == check and [bytes(s) for s in again.read(range(3))] == GOLDEN


def test_forked_children_read_what_the_parent_opened_and_used(tmp_path):
    samples = [bytes([i]) * 1000 for i in range(50)]
    reader = RecordReader(write(tmp_path / "a.ffr", samples), check="first")
    reader.read(range(10))
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            os._exit(0 if [bytes(s) for s in reader.read(range(50))] == samples else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert [bytes(s) for s in reader.read(range(50))] == samples


# --- damage ----------------------------------------------------------------------------------------------------------
def test_no_flipped_bit_goes_unnoticed(golden):
    for at in range(len(GOLDEN_FILE)):
        damaged = bytearray(GOLDEN_FILE)
        damaged[at] ^= 1 << at % 8
        golden.write_bytes(damaged)
        with pytest.raises(BadRecords, match=str(golden)):
            read_all(golden)


def test_no_truncation_goes_unnoticed(golden):
    for length in range(len(GOLDEN_FILE)):
        golden.write_bytes(GOLDEN_FILE[:length])
        with pytest.raises(BadRecords, match=str(golden)):
            RecordReader(golden)


@pytest.mark.parametrize("file", [GOLDEN_FILE, GOLDEN_EMPTY])
def test_bytes_added_at_the_end_are_noticed(golden, file):
    golden.write_bytes(file + b"\0")
    with pytest.raises(BadRecords, match=str(golden)):
        RecordReader(golden)


def test_a_damaged_sample_is_named_and_the_others_are_read(golden):
    damaged = bytearray(GOLDEN_FILE)
    damaged[49] ^= 1
    golden.write_bytes(damaged)
    reader = RecordReader(golden)
    with pytest.raises(BadRecords, match=r"golden\.ffr, sample 0: damaged"):
        reader.read_one(0)
    assert bytes(reader.read_one(2)) == GOLDEN[2]
    with pytest.raises(BadRecords, match="damaged samples 0 of 3"):
        reader.validate()


def test_never_checking_saves_what_is_left(golden):
    golden.write_bytes(GOLDEN_FILE[:-6] + b"XX")
    assert read_all(golden, check="never") == [b"hello", b"", bytes(range(250)) + b"XX"]
    damaged = bytearray(GOLDEN_FILE)
    damaged[0] ^= 1
    golden.write_bytes(damaged)
    assert read_all(golden, check="never") == GOLDEN


def test_first_checks_each_sample_once(tmp_path):
    path = write(tmp_path / "a.ffr", [b"aaaa", b"bbbb"])
    reader, strict = RecordReader(path, check="first"), RecordReader(path, check="always")
    reader.read_one(0)
    with path.open("r+b") as file:  # in place, so that the open map shows it
        file.seek(-8, os.SEEK_END)
        file.write(b"XXXX")
    assert bytes(reader.read_one(0)) == b"XXXX"
    with pytest.raises(BadRecords):
        strict.read_one(0)


@pytest.mark.parametrize(
    "header",
    [
        bytes(12 + 12 * 3),  # the writer never came back to the header
        bytes(4) + struct.pack("<q", 3) + bytes(36),  # it came to N
        bytes(4) + struct.pack("<q3I", 3, 1, 2, 3) + bytes(24),  # it came to the checksums
    ],
)
def test_a_file_of_a_writer_that_never_finished_is_called_that(golden, header):
    golden.write_bytes(header + GOLDEN_FILE[48:])
    with pytest.raises(UnfinishedRecords, match="never finished"):
        RecordReader(golden)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x89PNG\r\n\x1a\n" + bytes(100), b"<!DOCTYPE html><html><body>404</body></html>", b"short", b"\xff" * 64],
)
def test_what_is_no_record_file_is_refused(golden, content):
    golden.write_bytes(content)
    with pytest.raises(BadRecords, match=str(golden)):
        RecordReader(golden)


@pytest.mark.parametrize("count", [-1, -(2**62), 2**40, 2**62, 2**63 - 1])
def test_an_absurd_number_of_samples_costs_no_memory(golden, count):
    golden.write_bytes(GOLDEN_FILE[:4] + struct.pack("<q", count) + GOLDEN_FILE[12:])
    tracemalloc.start()
    with pytest.raises(BadRecords, match=f"promises {count} samples"):
        RecordReader(golden, check="first")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("offsets", [(48, 40, 53), (47, 53, 53), (48, 53, -1), (48, 10**9, 10**9)])
def test_offsets_that_a_right_checksum_guards_must_still_make_sense(golden, offsets):
    guarded = GOLDEN_FILE[4:24] + struct.pack("<3q", *offsets)
    golden.write_bytes(struct.pack("<I", zlib.crc32(guarded)) + guarded + GOLDEN_FILE[48:])
    for check in ("always", "never"):
        with pytest.raises(BadRecords, match=str(golden)):
            RecordReader(golden, check)


def test_missing_files_and_folders_without_records_are_named(tmp_path):
    with pytest.raises(BadRecords, match=r"nowhere\.ffr: cannot be opened"):
        RecordReader(tmp_path / "nowhere.ffr")
    with pytest.raises(EmptyDataset, match=str(tmp_path)):
        RecordReader(tmp_path)
    with pytest.raises(SettingsError, match="always, first, never"):
        RecordReader(tmp_path, check="sometimes")


# --- all or nothing --------------------------------------------------------------------------------------------------
def test_an_exception_leaves_nothing_new(golden):
    with pytest.raises(ZeroDivisionError), RecordWriter(golden, 2) as writer:
        writer.write_one(b"new")
        raise ZeroDivisionError
    assert golden.read_bytes() == GOLDEN_FILE and os.listdir(golden.parent) == [golden.name]


@pytest.mark.parametrize("written", [0, 1, 3])
def test_another_number_of_samples_than_promised_leaves_nothing(tmp_path, written):
    with pytest.raises(BadRecords, match="2"), RecordWriter(tmp_path / "a.ffr", 2) as writer:
        for _ in range(written):
            writer.write_one(b"sample")
    assert os.listdir(tmp_path) == []


def test_nothing_has_the_final_name_before_the_end(tmp_path):
    path = tmp_path / "a.ffr"
    writer = RecordWriter(path, 1)
    writer.write_one(b"sample")
    assert not path.exists()
    writer.close()
    writer.close()
    assert read_all(path) == [b"sample"] and os.listdir(tmp_path) == ["a.ffr"]
    with pytest.raises(BadRecords, match="closed"):
        writer.write_one(b"late")


def test_a_killed_writer_leaves_the_old_file(golden):
    script = (
        "import os, signal, sys\n"
        "from zoo.data.records import RecordWriter\n"
        "writer = RecordWriter(sys.argv[1], 2)\n"
        "writer.write_one(bytes(5_000_000))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(golden)], env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert ended.returncode == -signal.SIGKILL
    assert golden.read_bytes() == GOLDEN_FILE
    left = [name for name in os.listdir(golden.parent) if name != golden.name]
    assert len(left) == 1 and left[0].endswith(".part")
    assert read_all(golden.parent) == GOLDEN  # a folder of records does not see what was left behind


@pytest.mark.parametrize("when", ["sample", "header"])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, when, monkeypatch):
    writer = RecordWriter(tmp_path / "a.ffr", 1)

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full:
        closed = False
        write = seek = refuse if when == "sample" else lambda *_: 0
        flush = refuse
        close = writer._file.close

    writer._file = Full()
    with pytest.raises(DiskFull, match=r"no room for .*a\.ffr"):
        writer.write_one(b"sample")
        writer.close()
    assert os.listdir(tmp_path) == []


def test_reading_records_loads_neither_torch_nor_pillow(golden):
    script = (
        "import sys; from zoo.data import RecordReader; RecordReader(sys.argv[1]).read_one(0)\n"
        "sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(golden)]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0


def test_the_benchmark_runs(monkeypatch, capsys):
    script = str(ROOT / "benchmarks" / "bench_records.py")
    monkeypatch.setattr(
        sys, "argv", [script, "--megabytes", "1", "--size-kib", "4", "--samples", "100", "--rounds", "1"]
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "os.pread" in printed and "records, checked" in printed and "opening 100 samples" in printed
