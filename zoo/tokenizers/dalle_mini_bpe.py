"""DALL-E mini's and mega's tokenizer: BART's byte-level BPE, with a vocabulary of its own, over plain English text.

Facts from borisdayma/dalle-mini, `model/tokenizer.py` and `model/processor.py`; published are vocab.json and merges.txt
(kuprel/min-dalle has them too). min-dalle reads text in a simpler way than the model was trained with: here it is read
as in training, by `dalle_mini_text.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import models

from zoo.tokenizers.bpe import byte_level
from zoo.tokenizers.context import ContextTokenizer
from zoo.tokenizers.dalle_mini_text import normalise
from zoo.tokenizers.files import read_vocabulary
from zoo.tokenizers.unknown import tell_unknown

if TYPE_CHECKING:
    from torch import Tensor

START, PAD, END, UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"


class DalleMiniTokenizer(ContextTokenizer):
    """Text <-> the ids of DALL-E mini's vocabulary: start, text, end, and padding up to a context of 64.

    Emoji and letters of other scripts than the Latin are left out, and warned of, once.

    vocabulary, merges: a vocab.json and its merges.txt. Raises DataError for those of another kind.
    truncate: what happens to a text of more than `context_length` tokens: "end" cuts it and keeps the end token,
    "error" raises CaptionTooLong.
    """

    def __init__(
        self, vocabulary: str | Path, merges: str | Path, context_length: int = 64, *, truncate: str = "end"
    ) -> None:
        pieces, pairs = read_vocabulary(Path(vocabulary), Path(merges), needs=(START, PAD, END, UNKNOWN))
        self.context_length, self.truncate = context_length, truncate
        self.vocab_size = max(pieces.values()) + 1
        self.start_token, self.pad, self.end_token = pieces[START], pieces[PAD], pieces[END]
        self.all_special_ids = [pieces[special] for special in (START, PAD, END, UNKNOWN)]
        self.tokenizer = byte_level(models.BPE(pieces, pairs, unk_token=UNKNOWN))
        self._told: set[str] = set()

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without start and end. Raises DataError where no letter of it is known."""
        plain, unknown = normalise(text)
        tell_unknown(text, unknown, self._told)
        return self.tokenizer.encode(plain).ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Ids -> the text that the model reads, without specials."""
        return self.tokenizer.decode([int(id) for id in ids if int(id) not in self.all_special_ids]).removeprefix(" ")
