"""Train a vocabulary for CLIP's tokenizer: `python examples/train_tokenizer.py [captions.txt ...] --vocab-size 4096`.

The captions are lines of text files, or, without an argument, the English and Chinese captions and tags of the packaged
emoji set (its train split). The result has the format of OpenAI's file, so `ClipTokenizer(merges=file)` reads it;
the same captions always give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from zoo.data import open_dataset
from zoo.tokenizers.clip_bpe import ALPHABET, ENDS, WORD_END, ClipTokenizer, clean, split


def captions_of(files: list[Path]) -> Iterator[str]:
    """The lines of the files, or the captions and tags of the packaged set when there are none."""
    for file in files:
        with file.open(encoding="utf-8") as lines:
            yield from lines
    if not files:
        samples = open_dataset("emoji", split="train", language=None)
        for row in map(samples.row, range(len(samples))):
            yield ", ".join([row["caption_en"], *row["tags_en"]])
            yield "，".join([row["caption_zh"], *row["tags_zh"]])


def train(captions: Iterable[str], vocab_size: int) -> list[str]:
    """Captions -> merges, one "left right" each, for a vocabulary of `vocab_size` ids with bytes, ends and specials."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")  # the letters that stand for bytes hold no blank
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        # Naming all 512 first pieces fixes their ids, and ids decide between equally frequent pairs: the library alone
        # numbers the pieces that end a word in an order that changes from run to run.
        special_tokens=[*ALPHABET, *ENDS],
        end_of_word_suffix=WORD_END,
        show_progress=False,
    )
    tokenizer.train_from_iterator((" ".join(split(clean(text))) for text in captions), trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    # Two merges that spell the same piece count once for the library and twice in the file.
    return [" ".join(merge) for merge in merges][: vocab_size - 2 * len(ALPHABET) - 2]


def write(merges: list[str], path: Path) -> None:
    """The merges as a gzipped file without a name or date inside, so that equal merges are equal bytes."""
    text = "\n".join(["#version: 0.2", *merges, ""])
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path, nargs="*", help="text files, a caption a line; none: the emoji set")
    parser.add_argument("--vocab-size", type=int, default=4096, help="ids in all, with 512 for bytes and 2 specials")
    parser.add_argument("--out", type=Path, default=Path("bpe.txt.gz"), help="the merges file to write")
    given = parser.parse_args()
    if given.vocab_size <= 514:
        parser.error("--vocab-size: 514 ids are bytes and specials, so ask for more")
    texts = list(captions_of(given.captions))
    write(train(texts, given.vocab_size), given.out)
    tokenizer = ClipTokenizer(given.out)
    lengths = sorted(len(tokenizer.encode(text)) + 2 for text in texts)
    half, most = lengths[len(lengths) // 2], lengths[len(lengths) * 99 // 100]
    print(
        f"{given.out}: {tokenizer.vocab_size} ids. Of {len(texts)} captions half have up to {half} tokens, "
        f"99 % up to {most}, the longest {lengths[-1]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
