"""CLIP's tokenizer: byte-level BPE over cleaned, lower-cased text.

Facts from openai/CLIP, `simple_tokenizer.py` and `clip.py`; the ids are the published ones.
The merges are applied by the `tokenizers` library; cleaning and splitting happen here, since nothing in that library
repairs encodings (ftfy), undoes HTML entities, or has the letter and number tables of the `regex` package.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import ftfy
import regex
from tokenizers.models import BPE

from zoo.errors import DataError
from zoo.tokenizers.context import ContextTokenizer
from zoo.tokenizers.files import read_text

if TYPE_CHECKING:
    from torch import Tensor

PUBLISHED = Path(__file__).parent.parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"
PUBLISHED_HEADER = '"bpe_simple_vocab_16e6.txt'
PUBLISHED_MERGES = 48_894  # of the 262,144 in the file: 49,408 ids less 512 bytes less 2 specials
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"

_WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)
_SPACES = regex.compile(r"\s+")


def _byte_letters() -> str:
    """256 letters, the one at place b standing for byte b: itself where it prints, else one from U+0100 on."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    letters, spare = [], 256
    for byte in range(256):
        letters.append(chr(byte if byte in prints else spare))
        spare += byte not in prints
    return "".join(letters)


_LETTER_OF = dict(enumerate(_byte_letters()))
_BYTE_OF = {ord(letter): byte for byte, letter in _LETTER_OF.items()}
# Ids 0..255 are the letters in code order, those that print first. Id 0 is "!", which is also CLIP's padding.
ALPHABET = sorted(_LETTER_OF.values())
ENDS = [letter + WORD_END for letter in ALPHABET]


def clean(text: str) -> str:
    """Text as CLIP reads it: encoding repaired, HTML entities undone, blanks single, lower case."""
    if not isinstance(text, str):
        raise TypeError(f"a caption must be text, not {type(text).__name__}: {text!r}")
    # Printable ASCII has no broken encoding, control character or curly quote to repair; ftfy is most of the cost.
    if "&" in text or not (text.isascii() and text.isprintable()):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return _SPACES.sub(" ", text.strip()).strip().lower()


def split(text: str) -> list[str]:
    """Clean text -> its words, each of letters that stand for bytes: what merges work on."""
    return [word.encode().decode("latin-1").translate(_LETTER_OF) for word in _WORD.findall(text)]


def read_merges(path: Path) -> list[tuple[str, str]]:
    """The merges of a file: a header line, then one merge a line; plain or gzipped.

    Of OpenAI's file only the 48,894 that CLIP uses. Raises DataError for a file of another format.
    """
    header, _, text = read_text(path, "a merges file").removesuffix("\n").partition("\n")
    if "#version" not in header:
        raise DataError(f"{path} is not a merges file: its first line should be like '#version: 0.2'")
    count = PUBLISHED_MERGES if header.startswith(PUBLISHED_HEADER) else text.count("\n") + 1
    known, merges = {*ALPHABET, *ENDS}, []
    for number, line in enumerate(text.split("\n", count)[:count], start=2):
        pieces = tuple(line.split())
        if len(pieces) != 2 or pieces[0] not in known or pieces[1] not in known:
            raise DataError(f"{path} is not a merges file: line {number} should join two pieces of the lines above")
        known.add(pieces[0] + pieces[1])
        merges.append(pieces)
    return merges


class ClipTokenizer(ContextTokenizer):
    """Text <-> the ids of CLIP's vocabulary, or of a smaller one in the same format (`examples/train_tokenizer.py`).

    The vocabulary is 256 bytes, 256 bytes that end a word, one piece per merge, and last the start and end tokens:
    the end token is the largest id, where CLIP's text tower finds it by argmax.

    As published, `<|endoftext|>` written in a text becomes the end token itself, so that what follows it is not seen
    by the model: remove it first from text that strangers write, if that matters.

    merges: the vocabulary; None is OpenAI's, of 49,408 ids.
    truncate: what happens to a text of more than `context_length` tokens: "end" cuts it and keeps the end token,
    "error" raises CaptionTooLong.
    """

    def __init__(
        self, merges: str | Path | None = None, context_length: int = 77, *, truncate: str = "end", pad: int = 0
    ) -> None:
        self._merges = read_merges(Path(merges) if merges else PUBLISHED)
        vocabulary = [*ALPHABET, *ENDS, *map("".join, self._merges), START, END]
        self.encoder = {piece: id for id, piece in enumerate(vocabulary)}
        self.decoder = dict(enumerate(vocabulary))
        self.vocab_size = len(vocabulary)
        self.start_token, self.end_token = self.vocab_size - 2, self.vocab_size - 1
        self.all_special_ids = [self.start_token, self.end_token]
        self.context_length, self.truncate, self.pad = context_length, truncate, pad
        self._ids_of_word = lru_cache(maxsize=1 << 16)(self._merge)

    @cached_property
    def _bpe(self) -> BPE:
        """Made for the first text: a third of what a tokenizer costs, and models are loaded for other ends too."""
        return BPE(self.encoder, self._merges, end_of_word_suffix=WORD_END)

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without start and end."""
        return [id for word in split(clean(text)) for id in self._ids_of_word(word)]

    def decode(self, ids: Sequence[int] | Tensor, *, skip_special: bool = False) -> str:
        """Ids -> text, as published: every word is followed by a blank, start, end and padding are spelt out.

        skip_special: leave out the start token, all from the first end token on, and the last blank.
        """
        ids = [int(id) for id in ids]
        if skip_special:
            ids = ids[: ids.index(self.end_token)] if self.end_token in ids else ids
            ids = [id for id in ids if id != self.start_token]
        letters = "".join(self.decoder[id] for id in ids)
        text = letters.translate(_BYTE_OF).encode("latin-1").decode(errors="replace").replace(WORD_END, " ")
        return text.rstrip(" ") if skip_special else text

    def _merge(self, word: str) -> tuple[int, ...]:
        if word in (START, END):
            return (self.encoder[word],)
        return tuple(token.id for token in self._bpe.tokenize(word))

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_ids_of_word"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._ids_of_word = lru_cache(maxsize=1 << 16)(self._merge)
