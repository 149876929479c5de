"""What a run folder says of its run: the lines of log.jsonl as they come, and whether more are to be expected."""

from __future__ import annotations

import json
import math
import time
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO, NamedTuple

from zoo.errors import SettingsError
from zoo.plots.series import Series

POSITION = ("step", "epoch", "seconds")  # where the run is; all else is what it measured
USUAL = 30  # lines that tell how long a line usually takes
PATIENCE, LEAST = 5, 30.0  # stalled: no line for so many times the longest of these, and for so many seconds
HAPPENED = {
    "left_out": "{:g} of the updates left out: their loss or gradient was not finite",
    "skipped": "{:g} of the updates skipped",
    "rolled_back_to": "rolled back to step {:g}",
    "resumed_from": "resumed from step {:g}",
}
PLACES = ("rolled_back_to", "resumed_from")  # of those, the ones for which 0 is a place


class State(NamedTuple):
    """How a run stands: waiting, running, stalled or finished; and the same in words."""

    word: str
    text: str


class RunLog:
    """A run folder, read as far as it is written; `read` takes what has come since. Raises SettingsError.

    `fields` are the numbers by name, those of the evaluation as `eval/loss`; a value that is null or not finite has no
    step. Other groups, as the numbers of ranks and layers, are many, and only there if `whole`. A step that comes
    again, as after going back to a checkpoint, replaces all that was logged from it on.
    """

    def __init__(self, path: str | Path, *, whole: bool = False):
        path, self.whole = Path(path), whole
        self.folder = path.parent if path.name == "log.jsonl" else path
        check_folder(self.folder)
        self.file = self.folder / "log.jsonl"
        self.settings: dict[str, Any] = {}
        self.noticed: list[tuple[float, str]] = []  # seen while following; the file does not say it
        self._clear()
        self.read()

    def _clear(self) -> None:
        self.offset, self.tail, self.written = 0, b"", None
        self.fields: dict[str, Series] = {}
        self.position: dict[str, Series] = {name: Series(array("d"), array("d")) for name in POSITION}
        self.line: dict[str, Any] = {}
        self.unread = 0
        self.found: list[tuple[float, str]] = []

    @property
    def step(self) -> int:
        """Of the last line; 0 before the first."""
        return int(self.line.get("step", 0))

    @property
    def total(self) -> int | None:
        """The steps of the whole run, if it says so."""
        return int(number(self.settings.get("total_steps")) or 0) or None

    @property
    def events(self) -> list[tuple[float, str]]:
        """What happened, as (step, words), by step."""
        return sorted([*self.found, *self.noticed], key=lambda event: event[0])

    def read(self) -> None:
        """Takes the lines that are new. A last line that is half-written is left for the next time."""
        self.settings = read_settings(self.folder / "settings.json")
        try:
            with self.file.open("rb") as lines:
                self._go_on(lines)
                self.written = self.file.stat().st_mtime
        except FileNotFoundError:
            self._clear()

    def _go_on(self, lines: BinaryIO) -> None:
        before = None
        lines.seek(self.offset - len(self.tail))
        if lines.read(len(self.tail)) != self.tail:
            before = self.step
            self._clear()
            lines.seek(0)
        for line in lines:
            if not line.endswith(b"\n"):
                break
            self.offset, self.tail = self.offset + len(line), line
            self._take(line)
        if before is not None:
            now = f"from step {before:,} to {self.step:,}" if self.step < before else f"before step {before:,}"
            self.noticed.append((self.step, f"the run went back {now}: its lines are written again"))

    def _take(self, text: bytes) -> None:
        try:
            line = json.loads(text.decode())
        except (ValueError, RecursionError):
            line = None
        step = number(line.get("step")) if isinstance(line, dict) else None
        if step is None:
            self.unread += 1
            return
        steps = self.position["step"].steps
        if steps and step <= steps[-1]:
            self._cut(step)
            self.found.append((step, f"the run went back to step {step:,.0f}"))
        self.line = line
        for name, value in line.items():
            if type(value) is float and name in self.fields:
                append(self.fields, name, step, value)
            elif name in POSITION:
                append(self.position, name, step, value)
            elif name in HAPPENED:
                self._happened(name, step, value)
            elif isinstance(value, str):
                self.found.append((step, f"{name.replace('_', ' ')}: {value}"))
            elif not isinstance(value, (dict, list)):
                append(self.fields, name, step, value)
            elif self.whole or name == "eval":
                for member, one in flat(name, value):
                    append(self.fields, member, step, one)

    def _happened(self, name: str, step: float, value: Any) -> None:
        count = number(value)
        if count or (count == 0 and name in PLACES):
            self.found.append((step, HAPPENED[name].format(count)))

    def _cut(self, step: float) -> None:
        for series in (*self.fields.values(), *self.position.values()):
            kept = bisect_left(series.steps, step)
            del series.steps[kept:], series.values[kept:]

    def gaps(self) -> list[float]:
        """Seconds between the last lines."""
        times = self.position["seconds"].values[-USUAL - 1 :]
        return [b - a for a, b in pairwise(times)] or list(times)

    def left(self, now: float) -> float | None:
        """Seconds to go, at the rate of the last fifth of the lines; None if that is not known."""
        steps, times = self.position["seconds"]
        if self.total is None or not steps:
            return None
        first = -1 - max(len(steps) // 5, min(len(steps) - 1, USUAL))
        done, took = (steps[-1] - steps[first], times[-1] - times[first]) if len(steps) > 1 else (steps[-1], times[-1])
        if done <= 0 or took <= 0:
            return None
        return max((self.total - steps[-1]) * took / done - max(now - self.written, 0), 0)

    def state(self, now: float | None = None) -> State:
        """How the run stands at the time `now`, in seconds as files are dated."""
        now = time.time() if now is None else now
        if (self.folder / "model.safetensors").exists() and self.step >= (self.total or 0):
            return State("finished", "finished")
        if not self.line:
            return State("waiting", "no step logged yet")
        silent, gaps = now - self.written, self.gaps()
        if silent > max(PATIENCE * max(gaps, default=0), LEAST):
            usual = f", usually one every {duration(median(gaps))}" if gaps else ""
            return State("stalled", f"stalled or stopped: no line for {duration(silent)}{usual}")
        return State("running", "running")


# --- parts -----------------------------------------------------------------------------------------------------------
def check_folder(folder: Path) -> None:
    """Raises SettingsError if this is no run folder; `checkpoints` is the first thing that a run makes in it."""
    if any((folder / name).exists() for name in ("log.jsonl", "settings.json", "checkpoints")):
        return
    expected = "a run folder, as --run-folder names it, holds settings.json and log.jsonl"
    if not folder.is_dir():
        raise SettingsError(f"no folder {folder}: {expected}")
    inside = sorted({path.parent.name for path in folder.glob("*/log.jsonl")})
    there = f"give one of those in it: {', '.join(inside[:8])}" if inside else expected
    raise SettingsError(f"{folder} is not the folder of a run: {there}")


def read_settings(file: Path) -> dict[str, Any]:
    """What settings.json holds; nothing if it is not there, or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The values of a group or list with their names, `eval/loss` or `ranks/0`; another value as it is."""
    if isinstance(value, list):
        value = {str(place): one for place, one in enumerate(value)}
    if not isinstance(value, dict):
        yield name, value
        return
    for member, one in value.items():
        yield from flat(f"{name}/{member}", one)


def append(fields: dict[str, Series], name: str, step: float, value: Any) -> None:
    """Adds a value, if it is a finite number, to its series, which is made if it is new."""
    value = number(value)
    if value is None:
        return
    series = fields.get(name)
    if series is None:
        series = fields[name] = Series(array("d"), array("d"))
    series[0].append(step)
    series[1].append(value)


def number(value: Any) -> float | None:
    """A finite number; None for all else, such as null, text, true, or what no float holds."""
    if type(value) is float:  # nearly always, in logs of millions
        return value if math.isfinite(value) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def duration(seconds: float) -> str:
    """4,000 -> 1 h 06 min."""
    if seconds < 99.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"
