"""Pictures with captions, from a table, a folder or records, all as (image, text) samples, and their batches.

Pictures are handed to the transform as opened, in their own mode: the published CLIP preprocessing resizes first and
converts to RGB afterwards, so the conversion is the transform's.
"""

from __future__ import annotations

import csv
import os
import warnings
from array import array
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from zoo.errors import BadImage, BadRecords, BadTable, EmptyDataset, SettingsError

from .images import open_image, read_bytes, unpack_sample
from .records import PathLike, RecordReader

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_WARNINGS = 10  # bad pictures that a data set speaks of before it falls silent
Transform = Callable[[Image.Image], Any]
Sample = tuple[Any, Any]


class _Texts:
    """Many strings as one buffer and one table of ends.

    A list of a million str costs a worker process its own copy of every page (reading a str counts a reference, which
    writes to it, which ends the sharing after a fork) and 50 bytes more per str; a buffer is shared and pickles fast.
    """

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        self._bytes += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        return self._bytes[self._ends[i] : self._ends[i + 1]].decode("utf-8", "surrogatepass")


# --- data sets -------------------------------------------------------------------------------------------------------
class _Pairs(Dataset):
    """What the data sets of this file share: from a picture and a caption to a sample, and what to do with bad ones.

    A picture that cannot be used raises BadImage with `on_error="raise"`. With "skip" the next good sample stands in
    its place, so that lengths and order, and with them a resumed training, stay what they are; bad pictures are
    counted in `bad` (of this process: a loader's workers have their own), and the first few are warned about.
    """

    def __init__(self, transforms: Transform | None, tokenizer: Any, on_error: str) -> None:
        if on_error not in ("skip", "raise"):
            raise SettingsError(f"on_error={on_error!r}: choose 'skip' or 'raise'")
        self.transforms, self.tokenizer, self.on_error = transforms, tokenizer, on_error
        self.bad: dict[str, str] = {}  # name of the picture -> what is wrong with it

    def _load(self, i: int) -> tuple[Image.Image, str | None]:
        """The picture as opened, and its caption if it has one. Raises BadImage."""
        raise NotImplementedError

    def _name(self, i: int) -> str:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, i: int) -> Sample:
        """Number -> (what the transform makes of the picture, tokens (T,)).

        Without transform the PIL picture, without tokenizer the caption, without caption None.
        """
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        for step in range(len(self)):
            at = (i + step) % len(self)
            try:
                picture, caption = self._load(at)
                # The transform too finds pictures that cannot be used: too slender to be cropped, without pixels.
                image = self.transforms(picture) if self.transforms else picture
            except (BadImage, BadRecords) as error:
                if self.on_error == "raise":
                    raise
                self._report(self._name(at), str(error))
            else:
                return image, self._tokens(caption)
        raise EmptyDataset(f"none of the {len(self)} pictures can be read; the last: {self._name(at)}")

    def _report(self, name: str, reason: str) -> None:
        if name in self.bad:
            return
        self.bad[name] = reason
        if len(self.bad) <= _WARNINGS:
            last = "; further ones are only counted in `bad`" if len(self.bad) == _WARNINGS else ""
            warnings.warn(f"left out, the next sample stands in: {reason}{last}", UserWarning, stacklevel=4)

    def _tokens(self, caption: str | None) -> Any:
        if caption is None or self.tokenizer is None:
            return caption
        if hasattr(self.tokenizer, "tokenize_as_tensor"):
            return self.tokenizer.tokenize_as_tensor([caption])[0]  # (T,)
        return self.tokenizer(caption)


class CsvDataset(_Pairs):
    """The pairs of a table with a header row, one per line: by default tab-separated `title` and `filepath`.

    FlagAI's signature. `sep=None` reads .csv as comma-separated and all else as tab-separated; paths are relative to
    `img_dir`. Raises BadTable (no such file, not UTF-8, a column or a cell missing), EmptyDataset, and BadImage for
    pictures as `on_error` says (see `_Pairs`).
    """

    def __init__(
        self,
        input_filename: PathLike,
        img_dir: PathLike | None,
        transforms: Transform | None,
        tokenizer: Any,
        img_key: str = "filepath",
        caption_key: str = "title",
        sep: str | None = "\t",
        on_error: str = "skip",
    ) -> None:
        super().__init__(transforms, tokenizer, on_error)
        self.img_dir = os.fspath(img_dir or "")
        if sep is None:
            sep = "," if os.fspath(input_filename).lower().endswith(".csv") else "\t"
        self._paths, self._captions = _read_table(os.fspath(input_filename), sep, img_key, caption_key)

    def __len__(self) -> int:
        return len(self._paths)

    def _name(self, i: int) -> str:
        return os.path.join(self.img_dir, self._paths[i])

    def _load(self, i: int) -> tuple[Image.Image, str]:
        return open_image(self._name(i), mode=None), self._captions[i]


def _read_table(path: str, sep: str, img_key: str, caption_key: str) -> tuple[_Texts, _Texts]:
    paths, captions = _Texts(), _Texts()
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=sep)
            header = next(rows, [])
            missing = [key for key in (img_key, caption_key) if key not in header]
            if missing:
                raise BadTable(
                    f"{path}: no column {' or '.join(map(repr, missing))} among {header}; name the columns with "
                    "img_key= and caption_key=, and the separator with sep="
                )
            at_path, at_caption = header.index(img_key), header.index(caption_key)
            for row in rows:
                if not row:
                    continue
                if len(row) <= max(at_path, at_caption):
                    raise BadTable(
                        f"{path}, line {rows.line_num}: {len(row)} cells of {len(header)}; complete the line"
                    )
                paths.append(row[at_path])
                captions.append(row[at_caption])
    except UnicodeDecodeError as error:
        raise BadTable(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from error
    except csv.Error as error:
        raise BadTable(f"{path}, line {rows.line_num}: {error}; is a quotation mark left open?") from error
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise BadTable(f"{path}: cannot be opened ({error.strerror})") from error
    if not len(paths):
        raise EmptyDataset(f"{path}: a header and no line below it")
    return paths, captions


class FolderDataset(_Pairs):
    """The pictures below a folder, sorted by path; a caption is the text of the .txt file of the same stem, if any.

    `captions`: True demands a text for every picture (a missing one is a bad sample), False ignores texts, None takes
    them if the first picture has one. Raises EmptyDataset, and BadImage as `on_error` says (see `_Pairs`).
    """

    def __init__(
        self,
        folder: PathLike,
        transforms: Transform | None = None,
        tokenizer: Any = None,
        captions: bool | None = None,
        on_error: str = "skip",
    ) -> None:
        super().__init__(transforms, tokenizer, on_error)
        self.folder = Path(folder)
        found = (p for p in self.folder.rglob("*") if p.suffix.lower() in PICTURES)
        self._paths = _Texts(sorted(p.relative_to(self.folder).as_posix() for p in found))
        if not len(self._paths):
            raise EmptyDataset(f"{folder}: no picture in this folder or below ({', '.join(PICTURES)})")
        self.captions = Path(self._name(0)).with_suffix(".txt").is_file() if captions is None else captions

    def __len__(self) -> int:
        return len(self._paths)

    def _name(self, i: int) -> str:
        return str(self.folder / self._paths[i])

    def _load(self, i: int) -> tuple[Image.Image, str | None]:
        path = self._name(i)
        text = Path(path).with_suffix(".txt")
        caption = read_bytes(text).decode("utf-8-sig", "replace").strip() if self.captions else None
        return open_image(path, mode=None), caption


def _plain_caption(row: dict[str, Any]) -> str | None:
    return row.get("caption")


class RecordDataset(_Pairs):
    """The samples of record files written with `pack_sample`; `caption` makes the text out of a sample's row.

    `source`: a RecordReader, or what it takes; `indices`: only these samples, in this order. `row(i)` is the metadata
    of a sample. Damaged samples are treated as bad pictures, as `on_error` says (see `_Pairs`).
    """

    def __init__(
        self,
        source: RecordReader | PathLike | Iterable[PathLike],
        transforms: Transform | None = None,
        tokenizer: Any = None,
        caption: Callable[[dict[str, Any]], str | None] = _plain_caption,
        indices: Sequence[int] | None = None,
        on_error: str = "skip",
    ) -> None:
        super().__init__(transforms, tokenizer, on_error)
        self.reader = source if isinstance(source, RecordReader) else RecordReader(source, check="first")
        self.caption = caption
        self._indices = array("q", range(len(self.reader)) if indices is None else indices)
        if not len(self._indices):
            raise EmptyDataset(f"{', '.join(islice(self.reader.paths, 3))}: no samples")

    def __len__(self) -> int:
        return len(self._indices)

    def row(self, i: int) -> dict[str, Any]:
        """The metadata of sample `i`. Raises BadRecords."""
        return unpack_sample(self.reader.read_one(self._indices[i]), self._name(i))[0]

    def _name(self, i: int) -> str:
        return self.reader.name(self._indices[i])

    def _load(self, i: int) -> tuple[Image.Image, str | None]:
        row, picture = unpack_sample(self.reader.read_one(self._indices[i]), self._name(i))
        return open_image(picture, mode=None, name=self._name(i)), self.caption(row)


def collate_fn(batch: Sequence[Sample]) -> dict[str, Any]:
    """Samples -> {"image": (B, 3, H, W), "text": int64 (B, T)}; captions that were not tokenised stay a list of str.

    Without captions there is no "text". Raises SettingsError for PIL pictures, BadTable when only some have captions.
    """
    images, texts = zip(*batch, strict=True)
    if not isinstance(images[0], torch.Tensor):
        raise SettingsError("these samples hold PIL pictures: give the data set a transform that makes tensors of them")
    if 0 < sum(text is None for text in texts) < len(texts):
        raise BadTable("some samples of this batch have a caption and some have none; complete them or use none")
    made: dict[str, Any] = {"image": torch.stack(images)}
    if texts[0] is not None:
        made["text"] = torch.stack(texts) if isinstance(texts[0], torch.Tensor) else list(texts)
    return made
