"""Token ids -> the rows of one tensor, all of the model's context length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from zoo.errors import CaptionTooLong, SettingsError

if TYPE_CHECKING:
    from torch import Tensor


class ContextTokenizer:
    """What all tokenizers share: texts -> rows of tokens, all as long as the context.

    A tokenizer has `encode(text) -> ids`, `pad`, `context_length` and `truncate`, and where texts have them
    `start_token` and `end_token`. `bounded`: a text that is cut keeps its end token.
    """

    bounded = True
    context_length: int
    truncate: str
    pad: int

    def encode_whole(self, text: str) -> list[int]:
        """Text -> ids, with start and end."""
        return [self.start_token, *self.encode(text), self.end_token]

    def tokenize_as_tensor(
        self, texts: str | Iterable[str], context_length: int | None = None, truncate: str | None = None
    ) -> Tensor:
        """Texts -> int64 (n, context_length): ids, between start and end where there are such, then padding.

        None takes the tokenizer's own `context_length` and `truncate`. Raises CaptionTooLong where that is "error", and
        DataError for a text of which the vocabulary knows no letter.
        """
        return fill(
            [texts] if isinstance(texts, str) else list(texts),
            self.encode_whole,
            length=self.context_length if context_length is None else context_length,
            truncate=self.truncate if truncate is None else truncate,
            pad=self.pad,
            bounded=self.bounded,
        )

    __call__ = tokenize_as_tensor


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
