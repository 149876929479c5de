"""How fast record files are read and opened, beside plain `os.pread` of the same bytes, in one run.

    python benchmarks/bench_records.py
    python benchmarks/bench_records.py --size-kib 16 --megabytes 1024

Writes a record file of random samples to a temporary folder, reads its samples in random order from the warm page
cache, on one core and the best of some rounds, and opens a file of a million samples. The last column is the share of
the plain read's speed.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from zoo.data import RecordReader, RecordWriter


def best_seconds(work: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of some rounds, after one to warm up."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def read_start(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def read_speeds(path: Path, rounds: int) -> dict[str, float]:
    """Ways of reading all samples in random order -> GB/s. A view that nobody touches costs nothing: hence the sums."""
    reader = RecordReader(path)
    offsets = reader.get_offsets()
    order = random.Random(0).sample(range(len(reader)), len(reader))
    spans = [(int(offsets[i]), int(offsets[i + 1] - offsets[i])) for i in order]
    handle = os.open(path, os.O_RDONLY)
    unchecked = RecordReader(path, check="never")
    ways: dict[str, Callable[[], object]] = {
        "os.pread": lambda: [os.pread(handle, size, start) and None for start, size in spans],
        "os.pread and crc32": lambda: [zlib.crc32(os.pread(handle, size, start)) for start, size in spans],
        "records, unchecked, copied": lambda: [bytes(unchecked.read_one(i)) and None for i in order],
        "records, checked": lambda: [reader.read_one(i) and None for i in order],
    }
    total = sum(size for _, size in spans)
    speeds = {name: total / best_seconds(way, rounds) / 1e9 for name, way in ways.items()}
    os.close(handle)
    return speeds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-kib", type=int, default=100, help="size of a sample (default: %(default)s)")
    parser.add_argument("--megabytes", type=int, default=256, help="size of the file (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1_000_000, help="samples of the file to open (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of which the fastest counts (default: %(default)s)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, count = Path(folder, "read.ffr"), max(1, given.megabytes * 1000 // (given.size_kib + 1))
        with RecordWriter(path, count) as writer:
            for _ in range(count):
                writer.write_one(os.urandom(given.size_kib * 1024))
        speeds = read_speeds(path, given.rounds)
        plain = speeds["os.pread"]
        print(f"{count} samples of {given.size_kib} KiB, random order, warm, one core")
        for name, speed in speeds.items():
            print(f"  {name:<36}{speed:7.2f} GB/s {speed / plain:6.0%}")
        many = Path(folder, "open.ffr")
        with RecordWriter(many, given.samples) as writer:
            for _ in range(given.samples):
                writer.write_one(b"8 bytes.")
        seconds = best_seconds(lambda: RecordReader(many).close(), given.rounds)
        header = 12 + 12 * given.samples
        plain_seconds = best_seconds(lambda: read_start(many, header), given.rounds)
        print(f"opening {given.samples:,} samples: {seconds * 1e3:.1f} ms; plain read of that header: ", end="")
        print(f"{plain_seconds * 1e3:.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
