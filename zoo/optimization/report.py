"""What `optimize` did: a row for each replacement, advice, and the way back."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A replacement, the paths of its modules, time before / time after (None: not measured), kept or why not."""

    name: str
    where: tuple[str, ...]
    gain: float | None
    kept: bool
    why: str = ""

    @property
    def place(self) -> str:
        """The first module, and how many more."""
        return self.where[0] + (f" and {len(self.where) - 1} more" if len(self.where) > 1 else "")

    @property
    def outcome(self) -> str:
        """Kept or left alone, and why."""
        return ("kept" if self.kept else "left alone") + (f": {self.why}" if self.why else "")


class Report:
    """`rows` and `advice` (lines of code for the caller). `undo()`, or leaving `with report:`, takes all back."""

    def __init__(self, rows: tuple[Row, ...], advice: tuple[str, ...], undo: ExitStack):
        self.rows = rows
        self.advice = advice
        self._undo = undo

    def undo(self) -> None:
        """Gives every module back what it was. A second call does nothing."""
        self._undo.close()

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()

    def __str__(self) -> str:
        cells = [("replacement", "where", "gain", "outcome")]
        cells += [(r.name, r.place, "-" if r.gain is None else f"{r.gain:.2f}x", r.outcome) for r in self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in cells]
        if not self.rows:
            lines = ["nothing to replace: this model has no layer with a faster equal"]
        return "\n".join([*lines, *(f"advice: {line}" for line in self.advice)])
