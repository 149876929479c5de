"""Prompts -> pictures, for every model that can draw: seeds, batches, choosing the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from zoo.errors import SettingsError

Draw = Callable[[list[str], list[int]], Tensor]
Score = Callable[[str, list[Image.Image]], Sequence[float]]


def generate(
    draw: Draw,
    prompts: str | Sequence[str],
    n: int = 1,
    seed: int = 0,
    *,
    candidates: int | None = None,
    rerank: Score | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> list[list[Image.Image]]:
    """For each prompt a list of `n` pictures.

    `draw(prompts, seeds)` -> pictures (B, 3, H, W) of 0..1, one for each pair. A prompt's i-th candidate is drawn with
    `seed` + i, whatever else is drawn with it. `rerank(prompt, pictures)` -> a score each: of `candidates` the `n`
    highest are returned, best first. `batch_size`: so many pictures at a time; None: all. Raises SettingsError.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    candidates = n if candidates is None else candidates
    _check(prompts, n, candidates, rerank, batch_size)
    jobs = [(prompt, seed + i) for prompt in prompts for i in range(candidates)]
    size = batch_size or len(jobs)
    batches = [jobs[at : at + size] for at in range(0, len(jobs), size)]
    drawn: list[Image.Image] = []
    for batch in tqdm(batches, "batches", disable=not progress or len(batches) == 1, delay=2):
        drawn += to_pil(draw([prompt for prompt, _ in batch], [number for _, number in batch]))
    found = [drawn[at : at + candidates] for at in range(0, len(jobs), candidates)]
    if rerank is None:
        return found
    return [best_of(pictures, rerank(prompt, pictures), n) for prompt, pictures in zip(prompts, found, strict=True)]


def best_of(pictures: list[Image.Image], scores: Sequence[float], n: int) -> list[Image.Image]:
    """The `n` with the highest scores, best first; of equals the earlier."""
    order = sorted(range(len(pictures)), key=lambda i: -float(scores[i]))
    return [pictures[i] for i in order[:n]]


def to_pil(images: Tensor) -> list[Image.Image]:
    """Pictures (B, 3, H, W) of 0..1 -> RGB pictures."""
    pixels = images.detach().float().mul(255).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def _check(prompts: list[str], n: int, candidates: int, rerank: Score | None, batch_size: int | None) -> None:
    if not prompts:
        raise SettingsError("there is no prompt: give a text, or a list of texts; '' is a picture of anything")
    if n < 1 or (batch_size is not None and batch_size < 1):
        raise SettingsError(f"n={n!r}, batch_size={batch_size!r}: give 1 or more")
    if candidates < n:
        raise SettingsError(f"candidates={candidates}, of which n={n} are to be chosen: give as many or more")
    if candidates > n and rerank is None:
        raise SettingsError(f"candidates={candidates} and n={n}: give rerank=, which says what makes one better")
