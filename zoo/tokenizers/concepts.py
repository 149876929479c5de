"""Words of the user's own beside a vocabulary: the tokens of textual inversion (Gal et al. 2022)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from zoo.errors import SettingsError
from zoo.tokenizers.context import ContextTokenizer

if TYPE_CHECKING:
    from torch import Tensor


class ConceptTokenizer(ContextTokenizer):
    """A tokenizer, and tokens with ids of their own: where one stands in a text, in capitals or not, are its ids.

    A token such as <cat-toy> or easynegative is found as a whole word only: "art" is not in "party".
    """

    def __init__(self, base: ContextTokenizer):
        self.base = base
        self.ids: dict[str, list[int]] = {}
        self._form = re.compile(r"(?!)")  # finds none, until there are some
        self._found: list[list[int]] = []

    def add(self, token: str, ids: Iterable[int]) -> None:
        """Raises SettingsError for an empty token, one that was added, and one that the vocabulary has as one piece."""
        token = token.strip().lower()
        if not token:
            raise SettingsError("a concept needs a token to stand for it in prompts, such as <cat-toy>: give its name")
        if token in self.ids or len(self.base.encode(token)) == 1:
            raise SettingsError(f"there is a token {token!r} already: give the concept another name")
        self.ids[token] = list(ids)
        longest = sorted(self.ids, key=len, reverse=True)  # <cat-toy>2 before <cat-toy>
        self._form = re.compile("|".join(f"({_whole(token)})" for token in longest), re.IGNORECASE)
        self._found = [self.ids[token] for token in longest]

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without start and end."""
        ids, end = [], 0
        for found in self._form.finditer(text):
            ids += self._known(text[end : found.start()]) + self._found[found.lastindex - 1]
            end = found.end()
        return ids + self._known(text[end:]) if ids else self.base.encode(text)

    def _known(self, text: str) -> list[int]:
        return self.base.encode(text) if text.strip() else []

    def decode(self, ids: Sequence[int] | Tensor, *, skip_special: bool = False) -> str:
        """Ids -> text, as the tokenizer below does; a concept's ids are its token."""
        token_of = {id: token for token, own in self.ids.items() for id in own}
        texts = []
        for token, run in groupby(map(int, ids), key=token_of.get):
            run = list(run)
            if token is None:
                texts.append(self.base.decode(run, skip_special=skip_special).strip())
            else:
                texts += [token] * -(-len(run) // len(self.ids[token]))  # cut short, it is still that token
        return " ".join(texts)

    @property
    def vocab_size(self) -> int:
        """Ids below the concepts' own."""
        return self.base.vocab_size

    @property
    def context_length(self) -> int:
        """Tokens of a row."""
        return self.base.context_length

    @property
    def truncate(self) -> str:
        """What happens to a longer text."""
        return self.base.truncate

    @property
    def bounded(self) -> bool:
        """Whether texts have a start and an end token."""
        return self.base.bounded

    @property
    def pad(self) -> int:
        """The id of padding."""
        return self.base.pad

    @property
    def start_token(self) -> int:
        """The id before a text."""
        return self.base.start_token

    @property
    def end_token(self) -> int:
        """The id after a text."""
        return self.base.end_token

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of no text."""
        return self.base.all_special_ids


def _whole(token: str) -> str:
    """The token as a pattern; a letter at its end must not have another beside it."""
    before = r"(?<!\w)" if re.match(r"\w", token) else ""
    after = r"(?!\w)" if re.search(r"\w$", token) else ""
    return before + re.escape(token) + after
