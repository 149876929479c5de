"""A data set through the towers of a model, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.errors import EmptyDataset


def embed(
    encoders: Sequence[Callable[[Tensor], Tensor] | None],
    dataset: Dataset,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> list[Tensor]:
    """One pass over a data set of tuples of tensors -> the embeddings (N, E) that each encoder gives its column.

    The first encoder takes the first column, and so on; None skips a column. Embeddings come back as float32 on the
    CPU, in the order of the data set, so that a later metric is computed in the same precision whatever the model ran
    in. Nothing is differentiated. Put the model in evaluation mode first. Raises EmptyDataset.
    """
    if not len(dataset):
        raise EmptyDataset("there is no sample to embed: the data set is empty")
    columns = [column for column, encoder in enumerate(encoders) if encoder]
    parts: list[list[Tensor]] = [[] for _ in columns]
    with torch.inference_mode():
        for batch in DataLoader(dataset, batch_size=batch_size, num_workers=workers):
            for part, column in zip(parts, columns, strict=True):
                part.append(encoders[column](batch[column].to(device)).float().cpu())
    return [torch.cat(part) for part in parts]
