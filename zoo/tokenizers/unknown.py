"""What a vocabulary without all letters says about a text that it cannot read, or not all of."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from zoo.errors import DataError

log = logging.getLogger(__name__)


def tell_unknown(text: str, unknown: Iterable[str], told: set[str]) -> None:
    """Warn of the characters of a text that the vocabulary lacks, of each once: `told` is what was told before.

    Raises DataError where no letter and no digit is known: the picture would be of nothing.
    """
    lost = dict.fromkeys(unknown)
    if not lost:
        return
    if not any(character.isalnum() and character not in lost for character in text):
        raise DataError(
            f"this model's tokenizer knows no letter of {text[:60]!r}: write it in the language that the model learnt"
        )
    if new := [character for character in lost if character not in told]:
        told.update(new)
        log.warning("this model's tokenizer does not know %s: say it in other words", " ".join(map(repr, new)))
