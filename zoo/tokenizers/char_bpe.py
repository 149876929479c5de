"""minDALL-E's tokenizer: BPE of letters over lower-cased words.

Facts from kakaobrain/minDALL-E, `dalle/models/tokenizer.py`, which builds a CharBPETokenizer of the `tokenizers`
library; published are bpe-16k-vocab.json and bpe-16k-merges.txt, with 16,384 ids of English pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from zoo.tokenizers.context import ContextTokenizer
from zoo.tokenizers.files import read_vocabulary
from zoo.tokenizers.unknown import tell_unknown

if TYPE_CHECKING:
    from torch import Tensor

PAD, UNKNOWN, WORD_END = "[PAD]", "[UNK]", "</w>"


class CharBpeTokenizer(ContextTokenizer):
    """Text <-> the ids of minDALL-E's vocabulary: no start, no end, padding at the end of a context of 64.

    A letter that the vocabulary lacks is one [UNK]; it is warned of, once. Unlike there, "[PAD]" and "[UNK]" written in
    a text are words as any other.

    vocabulary, merges: a vocab.json and its merges.txt. Raises DataError for those of another kind.
    truncate: what happens to a text of more than `context_length` tokens: "end" cuts it, "error" raises
    CaptionTooLong.
    """

    bounded = False

    def __init__(
        self, vocabulary: str | Path, merges: str | Path, context_length: int = 64, *, truncate: str = "end"
    ) -> None:
        pieces, pairs = read_vocabulary(Path(vocabulary), Path(merges), needs=(PAD, UNKNOWN))
        self.context_length, self.truncate = context_length, truncate
        self.vocab_size, self.pad, self.unknown = len(pieces), pieces[PAD], pieces[UNKNOWN]
        self.tokenizer = Tokenizer(models.BPE(pieces, pairs, unk_token=UNKNOWN, end_of_word_suffix=WORD_END))
        # As published: blanks around Chinese letters, accents kept, punctuation apart.
        self.tokenizer.normalizer = normalizers.Sequence(
            [normalizers.BertNormalizer(lowercase=False), normalizers.Lowercase()]
        )
        self.tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self.tokenizer.decoder = decoders.BPEDecoder(suffix=WORD_END)
        self._told: set[str] = set()

    def encode(self, text: str) -> list[int]:
        """Text -> ids. Raises DataError where no letter of it is known."""
        read = self.tokenizer.encode(text)
        places = (place for id, place in zip(read.ids, read.offsets, strict=True) if id == self.unknown)
        tell_unknown(text, (text[begin:end] for begin, end in places), self._told)
        return read.ids

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Ids -> lower-case text with blanks around punctuation, without the padding and what was unknown."""
        return self.tokenizer.decode([int(id) for id in ids if int(id) not in (self.pad, self.unknown)])

    encode_whole = encode  # there is neither start nor end
