"""The data sets that have a name. `open_dataset("emoji", split="train")` works offline: its records ship with zoo.

emoji: 6,946 pictures of 64 x 64, on white, of 1,906 concepts in four styles (Microsoft Fluent Emoji, MIT: `fluent`,
`fluent3d`, `fluentflat`; Google Noto Emoji, Apache-2.0: `noto`), with English and Chinese captions and tags. Each
sample's row names its licence; the texts are in `zoo/assets/LICENSES`.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import SettingsError, UnknownDataset, nearest

from .images import unpack_sample
from .pairs import FolderDataset, RecordDataset, Transform
from .records import RecordReader

if TYPE_CHECKING:
    from torch.utils.data import Dataset

_ASSETS = Path(__file__).resolve().parent.parent / "assets"
Row = dict[str, Any]


def split_by_style(rows: list[Row]) -> dict[str, list[int]]:
    """Rows -> the numbers of the samples of "train", "test" and "all". Depends on nothing but the rows, for ever.

    Of each concept (`hex`) that is drawn in two or more styles, one style is the test's; all else is for training. A
    picture that stands under several names (a few families and flags look alike) is never the test's: it would be
    known from training.
    """
    names = Counter(row["pixels"] for row in rows)
    styles = defaultdict(list)
    for i, row in enumerate(rows):
        styles[row["hex"]].append(i)
    test = set()
    for concept, drawn in styles.items():
        candidates = sorted((i for i in drawn if names[rows[i]["pixels"]] == 1), key=lambda i: rows[i]["style"])
        if len(drawn) >= 2 and candidates:
            draw = int.from_bytes(hashlib.sha256(concept.encode()).digest()[:8], "big")
            test.add(candidates[draw % len(candidates)])
    train = [i for i in range(len(rows)) if i not in test]
    return {"train": train, "test": sorted(test), "all": list(range(len(rows)))}


@dataclass(frozen=True, kw_only=True)
class Captions:
    """The caption of a row that has them in English and Chinese.

    `language`: "en", "zh", or "both": one of the two at random. `tags`: so many of the row's tags, drawn at random,
    follow. Chance is torch's, drawn when the sample is taken: seed it per sample, and the captions come again.
    """

    language: str = "en"
    tags: int = 0

    def __call__(self, row: Row) -> str:
        import torch

        language = self.language
        if language == "both":
            language = ("en", "zh")[int(torch.randint(2, ()))]
        parts = [row[f"caption_{language}"]]
        if self.tags:
            tags = row[f"tags_{language}"]
            parts += [tags[i] for i in torch.randperm(len(tags))[: self.tags].tolist()]
        return ", ".join(parts) if language == "en" else "，".join(parts)


@dataclass(frozen=True, kw_only=True)
class NamedSet:
    """A row of the table below: where the records are and how they are divided."""

    file: str  # below zoo/assets
    about: str
    split: Callable[[list[Row]], dict[str, list[int]]]


_SETS = {
    "emoji": NamedSet(
        file="emoji.ffr",
        about="6,946 emoji of 64 x 64 in four styles, with English and Chinese captions",
        split=split_by_style,
    ),
}


def list_datasets() -> dict[str, str]:
    """Names of data sets -> what they are."""
    return {name: row.about for name, row in _SETS.items()}


def open_dataset(
    name: str,
    split: str = "train",
    transform: Transform | None = None,
    tokenizer: Any = None,
    language: str | Callable[[Row], str] | None = "en",
    tags: int = 0,
) -> RecordDataset:
    """A named data set of (image, text) samples; `.row(i)` is the metadata of a sample.

    `split`: "train", "test" or "all". `language`: "en", "zh", "both" (one of the two at random per sample), a function
    row -> caption, or None for pictures without captions; `tags` appends so many of the tags (see `Captions`).
    Without `transform` samples hold PIL pictures, without `tokenizer` captions. Raises UnknownDataset, SettingsError.
    """
    if name.lower() not in _SETS:
        raise UnknownDataset(f"no data set {name!r}; {nearest(name, _SETS)}")
    row = _SETS[name.lower()]
    if isinstance(language, str):
        if language not in ("en", "zh", "both"):
            raise SettingsError(f"language={language!r}: choose 'en', 'zh', 'both', None, or a function row -> caption")
        language = Captions(language=language, tags=tags)
    reader = RecordReader(_ASSETS / row.file, check="first")
    splits = row.split([unpack_sample(reader.read_one(i))[0] for i in range(len(reader))])
    if split not in splits:
        raise UnknownDataset(f"{name} has no split {split!r}; {nearest(split, splits)}")
    return RecordDataset(reader, transform, tokenizer, language or _no_caption, splits[split], on_error="raise")


def open_pictures(source: str | Path, split: str = "train", transform: Transform | None = None) -> Dataset:
    """Pictures without captions: of a named data set, of a folder, or of a file of records (.ffr).

    Only named ones are divided, so a `split` of others is all there is. Raises UnknownDataset, EmptyDataset.
    """
    if str(source).lower() in _SETS:
        return open_dataset(str(source), split, transform, language=None)
    path = Path(source)
    if path.is_dir():
        return FolderDataset(path, transform, captions=False)
    if path.suffix == ".ffr" and path.is_file():
        return RecordDataset(path, transform, caption=_no_caption)
    raise UnknownDataset(f"{str(source)!r} is no folder, no file of records (.ffr), and {nearest(str(source), _SETS)}")


def _no_caption(row: Row) -> None:
    return None
