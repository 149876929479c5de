"""Pictures turned into codes once, for trainings that read codes only."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
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
    encode: Callable[[Tensor], Tensor],
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Tensor:
    """The codes of every sample, int32 (M, h, w), in the data set's order. Samples hold pictures (3, H, W) first;
    `encode`: pictures (B, 3, H, W) -> codes (B, h, w)."""
    batches = DataLoader(dataset, batch_size=batch_size, collate_fn=_pictures)
    with torch.inference_mode():
        found = [
            encode(image.to(device)).to(torch.int32).cpu()
            for image in tqdm(batches, "codes", disable=not progress, delay=2)
        ]
    if not found:
        raise DataError("there is no picture to encode: the data set is empty")
    return torch.cat(found)


def check_codes(
    state: Mapping[str, Tensor], about: Mapping[str, Any], dataset: Dataset, tokenizer: nn.Module
) -> Tensor:
    """The codes (M, h, w) in a file that `zoo data encode` wrote, if they are of this data set and tokenizer.

    `state` and `about`: the file's tensors, and its config, where the fingerprint stands. Raises DataError that says
    what differs.
    """
    codes = state.get("codes")
    if codes is None:
        raise DataError(
            f"no codes in this file, but {', '.join(sorted(state)[:3]) or 'nothing'}: `zoo data encode` makes one"
        )
    if len(codes) != len(dataset):
        raise DataError(f"codes of {len(codes)} pictures, and the data set has {len(dataset)}: encode it again")
    if about.get("tokenizer") != fingerprint(tokenizer):
        raise DataError("these codes were made with another image tokenizer: encode the data set again with this one")
    return codes


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


def _pictures(samples: list[tuple]) -> Tensor:
    return torch.stack([sample[0] for sample in samples])
