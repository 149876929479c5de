"""Token ids -> the rows of one tensor, all of the model's context length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from zoo.errors import CaptionTooLong, SettingsError

if TYPE_CHECKING:
    from torch import Tensor


def fill(
    texts: Sequence[str],
    encode: Callable[[str], list[int]],
    *,
    length: int,
    truncate: str,
    pad: int,
    bounded: bool = True,
) -> Tensor:
    """Texts -> int64 (n, length), each row `encode(text)`, then padding.

    bounded: the ids of a text stand between a start and an end token.
    truncate: "end" cuts a longer text, and keeps its end token if it has one; "error" raises CaptionTooLong.
    """
    import torch

    if truncate not in ("end", "error"):
        raise SettingsError(f"truncate is 'end' or 'error', not {truncate!r}")
    if length < (2 if bounded else 1):
        what = "the start and end tokens" if bounded else "text"
        raise SettingsError(f"a context of {length} has no room for {what}")
    rows = []
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"a caption must be text, not {type(text).__name__}: {text!r}")
        ids = encode(text)
        if len(ids) > length:
            if truncate == "error":
                first, counted = " ".join(text.split()[:8])[:60], " with start and end" * bounded
                raise CaptionTooLong(
                    f"the caption that begins {first!r} has {len(ids)} tokens{counted}, and the context holds "
                    f"{length}: shorten it, or cut it with truncate='end'"
                )
            ids = [*ids[: length - 1], ids[-1]] if bounded else ids[:length]
        rows.append(ids + [pad] * (length - len(ids)))
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length)
