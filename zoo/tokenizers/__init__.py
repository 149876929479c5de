"""Text <-> token ids: CLIP's byte-level BPE, and a wrapper of the transformers tokenizers with the same methods."""

from __future__ import annotations

from zoo.tokenizers.clip_bpe import ClipTokenizer
from zoo.tokenizers.transformers_bpe import TransformersTokenizer

__all__ = ["ClipTokenizer", "TransformersTokenizer"]
