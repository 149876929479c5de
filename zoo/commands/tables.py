"""Text for a terminal: tables that fit its width, sizes and counts that a person reads."""

from __future__ import annotations

import shutil
import sys
import unicodedata
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Rows of cells under a header, columns aligned, those numbered in `right` to the right.

    On a terminal the widest columns are cut, with an ellipsis, until a row fits one line; anywhere else, as in a pipe,
    nothing is cut. Chinese, Japanese and Korean letters take two places, as terminals draw them.
    """
    lines = [list(header), *map(list, rows)]
    widths = [max(width(line[column]) for line in lines) for column in range(len(header))]
    if sys.stdout.isatty():
        room = shutil.get_terminal_size().columns - 2 * (len(widths) - 1)
        while sum(widths) > room and max(widths) > 8:
            widths[widths.index(max(widths))] -= 1
    return "\n".join(
        "  ".join(fit(cell, widths[i], i in right) for i, cell in enumerate(line)).rstrip() for line in lines
    )


def width(text: str) -> int:
    """How many places of a terminal the text takes."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Cf") for c in text)


def fit(text: str, places: int, right: bool = False) -> str:
    """The text in exactly so many places."""
    if width(text) > places:
        while width(text) > places - 1:
            text = text[:-1]
        text += "…"
    filling = " " * (places - width(text))
    return filling + text if right else text + filling


def in_bytes(size: float | None) -> str:
    """1,234,567 -> 1.2 MB."""
    if size is None:
        return "?"
    units = ["B", "kB", "MB", "GB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" or size >= 99.95 else f"{size:.1f} {units[0]}"


def in_millions(count: int | None) -> str:
    """151,277,313 -> 151.3 M."""
    if count is None:
        return "?"
    return f"{count / 1e9:.2f} B" if count >= 999.5e6 else f"{count / 1e6:.1f} M"


def as_json(value: object) -> str:
    """Pretty, with the letters of all scripts as they are."""
    import json

    return json.dumps(value, indent=2, ensure_ascii=False, default=str)
