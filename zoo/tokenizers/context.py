"""Token ids -> the rows of one tensor, all of the model's context length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from zoo.errors import CaptionTooLong, SettingsError

if TYPE_CHECKING:
    from torch import Tensor


def fill(texts: Sequence[str], encode: Callable[[str], list[int]], *, length: int, truncate: str, pad: int) -> Tensor:
    """Texts -> int64 (n, length), each row `encode(text)`, whose last id is the end token, then padding.

    truncate: "end" cuts a longer text and keeps its end token; "error" raises CaptionTooLong.
    """
    import torch

    if truncate not in ("end", "error"):
        raise SettingsError(f"truncate is 'end' or 'error', not {truncate!r}")
    if length < 2:
        raise SettingsError(f"a context of {length} has no room for the start and end tokens")
    rows = []
    for text in texts:
        ids = encode(text)
        if len(ids) > length:
            if truncate == "error":
                first = " ".join(text.split()[:8])[:60]
                raise CaptionTooLong(
                    f"the caption that begins {first!r} has {len(ids)} tokens with start and end, and the context "
                    f"holds {length}: shorten it, or cut it with truncate='end'"
                )
            ids = [*ids[: length - 1], ids[-1]]
        rows.append(ids + [pad] * (length - len(ids)))
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length)
