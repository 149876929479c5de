"""ruDALL-E's tokenizer: BPE of letters, from the text file that YouTokenToMe writes.

Facts from VKCOM/YouTokenToMe, `cpp/utils.cpp` and `cpp/bpe.cpp`, and ai-forever/ru-dalle, `tokenizer.py`; published is
bpe.model, with 16,384 ids of Russian pieces. The file is numbers only:

    letters merges          how many lines of each kind follow
    letter id               the code point of a letter
    left right made         the ids of two pieces and of what they become, the first merge first
    unknown pad start end   the ids of the specials
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import DataError
from zoo.tokenizers.context import ContextTokenizer
from zoo.tokenizers.files import read_text
from zoo.tokenizers.merging import merge
from zoo.tokenizers.unknown import tell_unknown

if TYPE_CHECKING:
    from torch import Tensor

BLANK = "▁"  # begins every word
_BLANKS = re.compile(f"[ \t\n\v\f\r{BLANK}]+")  # C's isspace: other blanks of Unicode are letters there


class YttmTokenizer(ContextTokenizer):
    """Text <-> the ids of ruDALL-E's vocabulary: start, lower-cased text, end, and padding up to a context of 128.

    A run of letters that the vocabulary lacks is one unknown id, as published; they are warned of, once.

    file: the bpe.model. Raises DataError for one of another kind.
    truncate: what happens to a text of more than `context_length` tokens: "end" cuts it, and as published its end token
    with it; "error" raises CaptionTooLong.
    """

    bounded = False  # as published, a text that is cut loses its end token

    def __init__(self, file: str | Path, context_length: int = 128, *, truncate: str = "end") -> None:
        self._id_of, self._rules, specials = _read(Path(file))
        self.unknown, self.pad, self.start_token, self.end_token = specials
        self.context_length, self.truncate = context_length, truncate
        self.pieces = {id: letter for letter, id in self._id_of.items()}
        for (left, right), (_, made) in self._rules.items():
            self.pieces[made] = self.pieces[left] + self.pieces[right]
        self.vocab_size = len(self.pieces) + len(specials)
        self._told: set[str] = set()

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without start and end. Raises DataError where no letter of it is known."""
        words = [word for word in _BLANKS.split(text.lower()) if word]
        tell_unknown(text, (letter for word in words for letter in word if letter not in self._id_of), self._told)
        return [id for word in words for id in merge(self._letters(word), self._rules)]

    def _letters(self, word: str) -> list[int]:
        """A word -> the ids of its letters after that of the blank."""
        ids = [self._id_of[BLANK]]
        for letter in word:
            id = self._id_of.get(letter, self.unknown)
            if id != self.unknown or ids[-1] != self.unknown:
                ids.append(id)
        return ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Ids -> lower-case text, without specials and what was unknown."""
        return "".join(self.pieces.get(int(id), "") for id in ids).replace(BLANK, " ").removeprefix(" ")


def _read(file: Path) -> tuple[dict[str, int], dict[tuple[int, int], tuple[int, int]], list[int]]:
    """A bpe.model -> the ids of letters, the rules of `merge`, and the ids of unknown, pad, start and end."""
    words = read_text(file, "a model of YouTokenToMe").split()
    try:
        letters, merges, *numbers = map(int, words)
        first, last = 2 * letters, 2 * letters + 3 * merges
        id_of = {chr(numbers[at]): numbers[at + 1] for at in range(0, first, 2)}
        rules = {
            (numbers[at], numbers[at + 1]): (rank, numbers[at + 2]) for rank, at in enumerate(range(first, last, 3))
        }
    except (ValueError, IndexError, OverflowError) as error:
        raise DataError(f"{file} is not a model of YouTokenToMe: {error}") from error
    specials, known = numbers[last:], set(id_of.values())
    for (left, right), (_, made) in rules.items():
        if not {left, right} <= known:
            raise DataError(
                f"{file} is a damaged model of YouTokenToMe: it joins {left} and {right} before both are made"
            )
        known.add(made)
    ids = [*id_of.values(), *(made for _, made in rules.values()), *specials]
    if BLANK not in id_of or sorted(ids) != list(range(letters + merges + 4)):
        raise DataError(
            f"{file} is not a whole model of YouTokenToMe: {letters} letters, {merges} merges and 4 specials should "
            "have an id each"
        )
    return id_of, rules, specials
