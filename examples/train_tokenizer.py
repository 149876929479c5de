"""Train a vocabulary for CLIP's tokenizer: `python examples/train_tokenizer.py [captions.txt ...] --vocab-size 4096`.

The captions are lines of text files, or, without an argument, the English and Chinese captions and tags of the packaged
emoji set (its train split). The result has the format of OpenAI's file, so `ClipTokenizer(merges=file)` reads it. With
`--kind dalle` it is a tokenizer.json for DALL-E, which `BpeTokenizer(file)` reads; of the emoji set only the captions
count then, one in each language. The same captions always give the same bytes.
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
from zoo.tokenizers import BpeTokenizer, ClipTokenizer, train_bpe
from zoo.tokenizers.bpe import FIRST_IDS
from zoo.tokenizers.clip_bpe import ALPHABET, ENDS, WORD_END, clean, split


def captions_of(files: list[Path], tags: bool) -> Iterator[str]:
    """The lines of the files, or the captions of the packaged set, with their tags or without, when there are none."""
    for file in files:
        with file.open(encoding="utf-8") as lines:
            yield from lines
    if not files:
        samples = open_dataset("emoji", split="train", language=None)
        for row in map(samples.row, range(len(samples))):
            yield ", ".join([row["caption_en"], *row["tags_en"] * tags])
            yield "，".join([row["caption_zh"], *row["tags_zh"] * tags])


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


def clip_vocabulary(captions: Iterable[str], vocab_size: int) -> str:
    """Captions -> the text of a merges file."""
    return "\n".join(["#version: 0.2", *train(captions, vocab_size), ""])


# What each kind needs: how to make the text of its file, how to read it, ids that are no merge, the file's name.
KINDS = {
    "clip": (clip_vocabulary, ClipTokenizer, 2 * len(ALPHABET) + 2, Path("bpe.txt.gz")),
    "dalle": (train_bpe, BpeTokenizer, len(FIRST_IDS), Path("bpe.json.gz")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path, nargs="*", help="text files, a caption a line; none: the emoji set")
    parser.add_argument("--kind", choices=KINDS, default="clip", help="whose tokenizer reads it (%(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=4096, help="ids in all (%(default)s); 514 of CLIP's and 257 are no merges"
    )
    parser.add_argument("--out", type=Path, help="the file to write (bpe.txt.gz for CLIP, bpe.json.gz for DALL-E)")
    given = parser.parse_args()
    make, read, fixed, out = KINDS[given.kind]
    out = given.out or out
    if given.vocab_size <= fixed:
        parser.error(f"--vocab-size: {fixed} ids are bytes and specials, so ask for more")
    texts = list(captions_of(given.captions, tags=given.kind == "clip"))
    # Without a name or date inside, equal vocabularies are equal bytes.
    out.write_bytes(gzip.compress(make(texts, given.vocab_size).encode(), mtime=0))
    tokenizer = read(out)
    specials = 2 if given.kind == "clip" else 0
    lengths = sorted(len(tokenizer.encode(text)) + specials for text in texts)
    half, most = lengths[len(lengths) // 2], lengths[len(lengths) * 99 // 100]
    print(
        f"{out}: {tokenizer.vocab_size} ids. Of {len(texts)} captions half have up to {half} tokens, "
        f"99 % up to {most}, the longest {lengths[-1]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
