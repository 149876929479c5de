"""The tokenizers of transformers behind the methods of ClipTokenizer: BERT's for Chinese-CLIP, XLM-R's for AltCLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from zoo.errors import DataError, SettingsError, nearest
from zoo.tokenizers.context import ContextTokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A tokenizer class of transformers, the file it reads, and the context of the model that is trained on it."""

    class_name: str
    vocabulary: str
    context_length: int


KINDS = {
    "bert": Kind(class_name="BertTokenizer", vocabulary="vocab.txt", context_length=52),  # Chinese-CLIP
    "xlm-roberta": Kind(
        class_name="XLMRobertaTokenizer", vocabulary="sentencepiece.bpe.model", context_length=77
    ),  # AltCLIP
}


class TransformersTokenizer(ContextTokenizer):
    """Text <-> ids by a tokenizer of transformers, which stays reachable as `.tokenizer`.

    Start, end and padding are the tokenizer's own: [CLS], [SEP], [PAD] = 0 for BERT; <s>, </s>, <pad> = 1 for XLM-R.
    BERT's ids are those of Chinese-CLIP, except that words of more than 100 letters are [UNK] here, there from 201 on.
    truncate: what happens to a text of more than `context_length` tokens: "end" cuts it and keeps the end token,
    "error" raises CaptionTooLong.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context_length: int, *, truncate: str = "end") -> None:
        self.tokenizer = tokenizer
        self.context_length, self.truncate = context_length, truncate
        self.vocab_size = len(tokenizer)
        self.start_token, self.end_token = tokenizer.cls_token_id, tokenizer.sep_token_id
        self.pad = tokenizer.pad_token_id
        self.all_special_ids = tokenizer.all_special_ids
        # A tokenizer.json may hold a length to cut or pad to; both are `fill`'s work here.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()

    @classmethod
    def from_folder(
        cls, folder: str | Path, kind: str, context_length: int | None = None, *, truncate: str = "end"
    ) -> TransformersTokenizer:
        """A tokenizer of a kind ("bert", "xlm-roberta") from a local folder, or from its vocabulary file alone.

        Reads `vocab.txt`, `sentencepiece.bpe.model` or `tokenizer.json`, never the network. None takes the context that
        the published model was trained with. Raises DataError when there is no vocabulary, SettingsError for the kind.
        """
        import transformers

        if kind not in KINDS:
            raise SettingsError(f"no kind of tokenizer {kind!r}; {nearest(kind, KINDS)}")
        row, folder = KINDS[kind], Path(folder)
        wanted = (row.vocabulary, "tokenizer.json")
        # Without a vocabulary transformers 5 makes a tokenizer of five tokens, and every word becomes [UNK].
        if not folder.is_file() and not any((folder / name).is_file() for name in wanted):
            raise DataError(f"{folder} holds no vocabulary of kind {kind!r}: it needs {' or '.join(wanted)}")
        tokenizer = getattr(transformers, row.class_name).from_pretrained(str(folder), local_files_only=True)
        return cls(tokenizer, context_length or row.context_length, truncate=truncate)

    def encode(self, text: str) -> list[int]:
        """Text -> ids, without start and end."""
        return self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | Tensor, *, skip_special: bool = False) -> str:
        """Ids -> text; start, end and padding are spelt out, or left out with `skip_special`."""
        return self.tokenizer.decode([int(id) for id in ids], skip_special_tokens=skip_special)

    def encode_whole(self, text: str) -> list[int]:
        """Text -> ids, with start and end."""
        return self.tokenizer.backend_tokenizer.encode(text).ids
