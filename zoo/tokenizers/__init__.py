"""Text <-> token ids: CLIP's BPE, DALL-E's of any size, those of published DALL-Es, and a wrapper of the transformers
tokenizers, alike in use."""

from __future__ import annotations

from zoo.tokenizers.bpe import BpeTokenizer, train_bpe
from zoo.tokenizers.char_bpe import CharBpeTokenizer
from zoo.tokenizers.clip_bpe import ClipTokenizer
from zoo.tokenizers.dalle_mini_bpe import DalleMiniTokenizer
from zoo.tokenizers.transformers_bpe import TransformersTokenizer
from zoo.tokenizers.yttm import YttmTokenizer

__all__ = [
    "BpeTokenizer",
    "CharBpeTokenizer",
    "ClipTokenizer",
    "DalleMiniTokenizer",
    "TransformersTokenizer",
    "YttmTokenizer",
    "train_bpe",
]
