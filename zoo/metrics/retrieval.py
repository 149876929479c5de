"""Recall at k between pictures and captions, in bounded memory. N pictures, M captions, E embedding."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import DataError, EmptyDataset

# float32 embeddings of equal inputs differ by about this much between batches of different shapes.
TIE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """How far down the right answers stand. `recall[k]`: share of queries with a right answer among the first k.
    Ranks start at 1."""

    recall: dict[int, float]
    median_rank: float
    mean_rank: float
    queries: int
    candidates: int


def recall(
    images: Tensor,
    texts: Tensor,
    *,
    image_owner: Sequence[int] | Tensor | None = None,
    text_owner: Sequence[int] | Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    block: int = 2**22,
) -> dict[str, Ranks]:
    """Embeddings of pictures (N, E) and captions (M, E) -> {"picture_to_text": Ranks, "text_to_picture": Ranks}.

    A picture and a caption belong together where their owners are equal: `image_owner` (N,) and `text_owner` (M,) are
    whole numbers, by default 0, 1, 2, ... So five captions per picture is `text_owner=[0, 0, 0, 0, 0, 1, ...]`, and
    several pictures per caption is the same with `image_owner`.

    A query counts as answered by the best of its right answers (the "any hit" definition of CLIP_benchmark). Ties are
    pessimistic: a wrong answer whose cosine is within 1e-6 of the right one, or is not a number, stands before it, so
    equal embeddings for everything earn nothing. Cosines are computed in float64, at most `block` at a time (one row of
    candidates where that is more), never as a whole N x M matrix.

    Raises EmptyDataset without pictures or captions, DataError when shapes disagree or a query has no right answer.
    """
    if not len(images) or not len(texts):
        raise EmptyDataset(f"retrieval needs pictures and captions; there are {len(images)} and {len(texts)}")
    if images.shape[1:] != texts.shape[1:]:
        raise DataError(f"embeddings of pictures and captions differ in shape: {(*images.shape,)}, {(*texts.shape,)}")
    images, texts = (F.normalize(x.detach().double(), dim=-1) for x in (images, texts))
    own_images = owners(image_owner, images, "image_owner")
    own_texts = owners(text_owner, texts, "text_owner")
    to_text = ranks(images, texts, own_images, own_texts, block)
    to_picture = ranks(texts, images, own_texts, own_images, block)
    return {
        "picture_to_text": summary(to_text, len(texts), ks),
        "text_to_picture": summary(to_picture, len(images), ks),
    }


def owners(given: Sequence[int] | Tensor | None, embeddings: Tensor, name: str) -> Tensor:
    """The owner of each embedding (N,), on its device."""
    device = embeddings.device
    if given is None:
        return torch.arange(len(embeddings), device=device)
    given = torch.as_tensor(given, device=device)
    if given.shape != embeddings.shape[:1]:
        raise DataError(f"{name} has the shape {(*given.shape,)}; there are {len(embeddings)} embeddings")
    return given


def ranks(queries: Tensor, candidates: Tensor, query_owner: Tensor, candidate_owner: Tensor, block: int) -> Tensor:
    """Normalised queries (N, E) and candidates (M, E) -> the rank of each query's best right answer (N,)."""
    lonely = ~torch.isin(query_owner, candidate_owner)
    if lonely.any():
        first = int(lonely.nonzero()[0])
        raise DataError(f"{int(lonely.sum())} of {len(queries)} queries have no right answer, the first is {first}")
    rows = max(1, block // len(candidates))
    found = []
    for start in range(0, len(queries), rows):
        scores = queries[start : start + rows] @ candidates.T
        right = query_owner[start : start + rows, None] == candidate_owner
        best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        # "not below" rather than "above or equal": a score that is not a number must not help.
        found.append(1 + (~(scores < best - TIE) & ~right).sum(1))
    return torch.cat(found)


def summary(found: Tensor, candidates: int, ks: Sequence[int]) -> Ranks:
    """Ranks (N,) -> their figures."""
    found = found.tolist()
    return Ranks(
        recall={k: sum(rank <= k for rank in found) / len(found) for k in ks},
        median_rank=float(statistics.median(found)),
        mean_rank=statistics.fmean(found),
        queries=len(found),
        candidates=candidates,
    )
