"""Pictures turned into codes or latents once, for trainings that read these only; captions into contexts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from zoo.errors import DataError

from .pairs import Sample


def fingerprint(tokenizer: nn.Module) -> str:
    """What tells an image tokenizer's weights from others: the SHA-256 of their names and numbers, in hex."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def encode_dataset(
    dataset: Dataset,
    encodes: Mapping[str, Callable[[Tensor], Tensor]],
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = True,
    part: int = 0,
) -> dict[str, Tensor]:
    """What each of `encodes`, pictures (B, 3, H, W) -> (B, ...), says of every sample, (M, ...), in the data set's
    order: whole numbers, such as codes, in int32, others in fp32. Samples hold pictures (3, H, W) first; `part` 1 is
    their tokens (T,). Raises DataError for none."""
    found: dict[str, list[Tensor]] = {name: [] for name in encodes}
    batches = DataLoader(dataset, batch_size=batch_size, collate_fn=partial(_parts, part))
    with torch.inference_mode():
        for given in tqdm(batches, ("pictures", "captions")[part], disable=not progress, delay=2):
            for name, encode in encodes.items():
                value = encode(given.to(device))
                found[name].append(value.to("cpu", torch.float32 if value.is_floating_point() else torch.int32))
    if not all(found.values()):
        raise DataError("there is no picture to encode: the data set is empty")
    return {name: torch.cat(parts) for name, parts in found.items()}


def check_codes(
    state: Mapping[str, Tensor],
    about: Mapping[str, Any],
    dataset: Dataset,
    tokenizer: nn.Module,
) -> Tensor:
    """The codes (M, h, w) in a file that `zoo data encode` wrote, if they are of this data set and tokenizer.

    `state` and `about`: the file's tensors, and its config, where the fingerprint stands. Raises DataError that says
    what differs.
    """
    return _of_pictures("codes", state, about, dataset, tokenizer)


def check_moments(state: Mapping[str, Tensor], about: Mapping[str, Any], dataset: Dataset, vae: nn.Module) -> Tensor:
    """The moments (M, 2 C, h, w) in such a file, if they are of this data set and VAE. Raises DataError."""
    return _of_pictures("moments", state, about, dataset, vae)


def _of_pictures(
    name: str, state: Mapping[str, Tensor], about: Mapping[str, Any], dataset: Dataset, tokenizer: nn.Module
) -> Tensor:
    found = state.get(name)
    if found is None:
        raise DataError(
            f"no {name} in this file, but {', '.join(sorted(state)[:3]) or 'nothing'}: `zoo data encode` makes one"
        )
    if len(found) != len(dataset):
        raise DataError(f"{name} of {len(found)} pictures, and the data set has {len(dataset)}: encode it again")
    if about.get("tokenizer") != fingerprint(tokenizer):
        raise DataError(f"these {name} were made with another image tokenizer: encode the data set again with this one")
    return found


def check_contexts(
    state: Mapping[str, Tensor], about: Mapping[str, Any], language: str | None, text: nn.Module
) -> Tensor | None:
    """The contexts (M, T, D) of captions in such a file, if they are by this text tower and in this language (None: of
    a table's captions); None where the file has none. Raises DataError."""
    found = state.get("contexts")
    if found is None:
        return None
    if about.get("text") != fingerprint(text):
        raise DataError("the contexts in this file are by another text tower: encode the data set again, or leave them")
    if about.get("language") != language:
        raise DataError(
            f"the contexts in this file are of captions in {about.get('language') or 'a table'}, not of "
            f"{language or 'a table'}: encode the data set again, or without --matcher"
        )
    return found


def check_embeddings(
    state: Mapping[str, Tensor], about: Mapping[str, Any], codes: Tensor, matcher: nn.Module
) -> Tensor:
    """The embeddings (M, E) beside the `codes` in such a file, if they are of this matching model. Raises DataError."""
    found = state.get("embeddings")
    if found is None or len(found) != len(codes) or about.get("matcher") != fingerprint(matcher):
        raise DataError(
            "this file has no embeddings by this CLIP: encode the data set again, `zoo data encode --matcher NAME`"
        )
    return found


class Texts(Dataset):
    """The captions of pairs."""

    def __init__(self, pairs: Dataset) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> Any:
        return self.pairs[i][1]


class CodesDataset(Dataset):
    """Samples of `pairs` with codes (h, w) in place of pictures: (codes, text)."""

    def __init__(self, pairs: Dataset, codes: Tensor) -> None:
        if len(pairs) != len(codes):
            raise DataError(f"{len(codes)} codes for {len(pairs)} samples: encode this data set")
        self.pairs, self.codes = pairs, codes

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, i: int) -> Sample:
        return self.codes[i].to(torch.int64), self.pairs[i][1]


def codes_collate(batch: Sequence[Sample]) -> dict[str, Tensor]:
    """Samples -> {"codes": int64 (B, h, w), "text": int64 (B, T)}."""
    codes, texts = zip(*batch, strict=True)
    return {"codes": torch.stack(codes), "text": torch.stack(texts)}


def _parts(part: int, samples: list[tuple]) -> Tensor:
    return torch.stack([sample[part] for sample in samples])
