"""DALL-E's tokenizer: byte-level BPE of any size, trained on captions, with BPE dropout.

From the paper (Ramesh et al. 2021): captions are lower-cased, merges are dropped with a probability of 10% in training,
and every place of the context without text has an embedding of its own. So the padding is an id that no text can
produce, and there is neither a start nor an end token. The published vocabulary, of 16,384, was never released.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from zoo.errors import DataError, SettingsError
from zoo.tokenizers.clip_bpe import ALPHABET, clean
from zoo.tokenizers.context import ContextTokenizer
from zoo.tokenizers.files import read_json
from zoo.tokenizers.merging import merge

if TYPE_CHECKING:
    from torch import Tensor

# Its brackets are none of the 256 letters that stand for bytes: no merge spells it, and no text becomes id 0.
PAD = "⟨pad⟩"
FIRST_IDS = [PAD, *ALPHABET]


def train_bpe(captions: Iterable[str], vocab_size: int) -> str:
    """Captions -> a vocabulary of up to `vocab_size` ids, as the text of a `tokenizer.json`.

    Ids are the padding, 256 bytes, and a merge each: fewer than asked for where no two pieces still meet twice. The
    same captions give the same text. Raises SettingsError for a size without room for a merge.
    """
    if vocab_size <= len(FIRST_IDS):
        raise SettingsError(f"{len(FIRST_IDS)} ids are the padding and the bytes: ask for more than {vocab_size}")
    tokenizer = byte_level(models.BPE())
    # Naming the first ids fixes them, and ids decide between equally frequent pairs.
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, special_tokens=FIRST_IDS, show_progress=False)
    tokenizer.train_from_iterator(map(clean, captions), trainer)
    made = json.loads(tokenizer.to_str())["model"]
    # Made anew: as special tokens the bytes would be found in the text before it is split into words.
    return byte_level(models.BPE(made["vocab"], [tuple(pair) for pair in made["merges"]])).to_str(pretty=False)


def byte_level(model: models.BPE) -> Tokenizer:
    """The library's tokenizer with GPT-2's splitting into words, each with the blank before it."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # "cat" is one piece in every place
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


class BpeTokenizer(ContextTokenizer):
    """Text <-> the ids of a vocabulary that `examples/train_tokenizer.py --kind dalle` or `train_bpe` made.

    Text is cleaned and lower-cased as CLIP's is; any text has ids, since the smallest pieces are bytes.

    file: a `tokenizer.json`, plain or gzipped. Raises DataError for one of another kind.
    dropout: how likely each merge is left out, 0 to 1: 0.1 in the paper's training. It draws one number per text from
    torch's random state, so that a training can be repeated and resumed.
    truncate: what happens to a text of more than `context_length` tokens: "end" cuts it, "error" raises
    CaptionTooLong.
    """

    bounded = False

    pad = 0

    def __init__(
        self, file: str | Path, context_length: int = 256, dropout: float = 0.0, *, truncate: str = "end"
    ) -> None:
        if not 0 <= dropout <= 1:
            raise SettingsError(f"dropout is how likely a merge is left out, 0 to 1, not {dropout}")
        vocabulary, merges = _read(Path(file))
        self.context_length, self.dropout, self.truncate = context_length, dropout, truncate
        self.vocab_size = len(vocabulary)
        self.tokenizer = byte_level(models.BPE(vocabulary, merges))
        self._id_of = {letter: vocabulary[letter] for letter in ALPHABET}
        self._rules = {
            (vocabulary[left], vocabulary[right]): (rank, vocabulary[left + right])
            for rank, (left, right) in enumerate(merges)
        }

    def encode(self, text: str) -> list[int]:
        """Text -> ids, none of which is the padding; other ids each time if there is dropout."""
        text = clean(text)
        return self._drawn(text) if self.dropout else self.tokenizer.encode(text).ids

    def _drawn(self, text: str) -> list[int]:
        """Clean text -> ids, each merge dropped or not by chance."""
        import torch

        # One draw per text; the many of its merges come from Python's generator, which is quicker by far.
        chance = random.Random(int(torch.randint(1 << 62, ()))).random
        words = (word for word, _ in self.tokenizer.pre_tokenizer.pre_tokenize_str(text))
        letters = ([self._id_of[letter] for letter in word] for word in words)
        return [id for word in letters for id in merge(word, self._rules, lambda: chance() < self.dropout)]

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Ids -> clean text, without the padding."""
        return self.tokenizer.decode([int(id) for id in ids if int(id) != self.pad]).removeprefix(" ")

    encode_whole = encode  # there is neither start nor end


def _read(file: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and merges of a `tokenizer.json` by `train_bpe`. Raises DataError."""
    try:
        model = read_json(file, "a tokenizer.json")["model"]
        vocabulary, merges = model["vocab"], [(left, right) for left, right in model["merges"]]
        whole = sorted(vocabulary.values()) == list(range(len(vocabulary)))
        known = all({left, right, left + right} <= vocabulary.keys() for left, right in merges)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{file} is not a tokenizer.json of byte-level BPE: {error!r}") from error
    if not (whole and known and [vocabulary.get(piece) for piece in FIRST_IDS] == list(range(len(FIRST_IDS)))):
        raise DataError(
            f"{file} is a tokenizer.json of another kind: make one with examples/train_tokenizer.py --kind dalle"
        )
    return vocabulary, merges
