"""What is left of pictures after an image tokenizer, and how it uses its codes. h w: the grid of codes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zoo.errors import EmptyDataset
from zoo.metrics.codes import usage
from zoo.metrics.pictures import psnr


def reconstruction(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    vocab: int | None,
    dataset: Dataset,
    *,
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """One pass over a data set of tuples, pictures (3, H, W) of 0..1 first -> figures of it.

    `encode`: pictures (B, 3, H, W) -> codes (B, h, w), below `vocab`, or where that is None latents; `decode` is its
    inverse. `psnr`: the mean over the pictures, in decibels. `lpips`: the mean of `distance`, where it is given.
    `code_usage` and `code_perplexity`: see `usage`, over all codes together. Nothing is differentiated. Put the model
    in evaluation mode first. Raises EmptyDataset.
    """
    if not len(dataset):
        raise EmptyDataset("there is no picture to reconstruct: the data set is empty")
    codes, ratios, distances = [], [], []
    with torch.inference_mode():
        for image in DataLoader(dataset, batch_size=batch_size, collate_fn=_pictures):
            image = image.to(device)
            code = encode(image)
            again = decode(code).float()
            codes += [] if vocab is None else [code]
            ratios.append(psnr(again, image))
            if distance:
                distances.append(distance(again, image))
    found = {"pictures": len(dataset), "psnr": float(torch.cat(ratios).mean())}
    if distance:
        found["lpips"] = float(torch.cat(distances).mean())
    return found if vocab is None else found | usage(torch.cat(codes), vocab)


def _pictures(samples: list[tuple]) -> Tensor:
    return torch.stack([sample[0] for sample in samples])
