"""Prompts of any length, with weights on their words, in the syntax of the popular web UI (AUTOMATIC1111).

B windows, T tokens, D width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from zoo.errors import SettingsError

if TYPE_CHECKING:
    from torch import Tensor

STRONGER = 1.1  # what a pair of round brackets multiplies by; square ones divide
BACKTRACK = 20  # a window is cut after a comma among so many of its last ids, as that web UI does

# An escaped bracket, the end of (words:1.3), a bracket, text; a backslash or colon that is none of these is text too.
_PIECE = re.compile(r"\\[()\[\]\\]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|[\\:]")


def weighted(prompt: str) -> list[tuple[str, float]]:
    """A prompt -> its texts and their weights: (words:1.3) weigh 1.3, (words) 1.1, [words] 1 / 1.1, all others 1.

    Brackets inside brackets multiply. A backslash before a bracket makes it a letter, as is a bracket without its other
    half. Neighbours of one weight are one text; texts without a letter are left out.
    """
    pieces = list(_PIECE.finditer(prompt))
    factors, closing = _brackets(pieces)
    texts: list[tuple[str, float]] = []
    weights = [1.0]
    for place, piece in enumerate(pieces):
        if place in factors:
            weights.append(weights[-1] * factors[place])
        elif place in closing:
            weights.pop()
        else:
            text = piece[0][1:] if piece[0].startswith("\\") and len(piece[0]) == 2 else piece[0]
            if texts and texts[-1][1] == weights[-1]:
                text = texts.pop()[0] + text
            texts.append((text, weights[-1]))
    return [(text, weight) for text, weight in texts if text.strip()]


def _brackets(pieces: list[re.Match]) -> tuple[dict[int, float], set[int]]:
    """The places of brackets that have their other half: what each that opens multiplies by, and those that close."""
    factors: dict[int, float] = {}
    closing: set[int] = set()
    waiting: list[tuple[int, str]] = []
    for place, piece in enumerate(pieces):
        last = piece[0][-1]
        if piece[0] in ("(", "["):
            waiting.append((place, last))
        elif piece[0] in (")", "]") or piece[1] is not None:
            opener = "(" if last == ")" else "["
            same = [number for number, (_, bracket) in enumerate(waiting) if bracket == opener]
            if same:
                start = waiting[same[-1]][0]
                del waiting[same[-1] :]  # what opened after it has no other half
                factors[start] = float(piece[1]) if piece[1] else (STRONGER if opener == "(" else 1 / STRONGER)
                closing.add(place)
    return factors, closing


def windows(
    parts: Sequence[tuple[str, float]], encode: Callable[[str], list[int]], room: int
) -> list[list[tuple[int, float]]]:
    """Texts and their weights -> ids with the weight of each, in windows of at most `room` ids; none for no text.

    A window that another follows ends after the last comma of its last 20 ids, if there is one, so that no phrase is
    torn apart: the popular web UI's rule. `encode(text)` gives ids without start and end. Raises SettingsError for no
    room.
    """
    if room < 1:
        raise SettingsError(f"a window with room for {room} ids holds no prompt: give it 1 or more")
    comma = encode("a,")[-1:]  # after a letter, since some vocabularies have a sign of its own for a comma that begins
    left = [(id, weight) for text, weight in parts for id in encode(text)]
    cut = []
    while len(left) > room:
        end = room
        if [left[room][0]] != comma:
            commas = (place for place in range(max(0, room - BACKTRACK), room) if [left[place][0]] == comma)
            end = max(commas, default=room - 1) + 1
        cut.append(left[:end])
        left = left[end:]
    return [*cut, left] if left else cut


def weigh(context: Tensor, weights: Tensor) -> Tensor:
    """Context (B, T, D) and a weight for each token (B, T) -> each vector times its weight, then the window's mean
    what it was: the popular web UI's way. A window whose weights are all 1 is what it was, bit for bit."""
    plain = context.float()
    weighed = plain * weights.float()[..., None]
    before, after = plain.mean((1, 2), keepdim=True), weighed.mean((1, 2), keepdim=True)
    weighed = weighed * (before / after).where(after != 0, 1.0)
    untouched = (weights == 1).all(1)[:, None, None]
    return context.where(untouched, weighed.to(context.dtype))
