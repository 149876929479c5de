"""Choosing among drawn pictures by how well CLIP says that they fit the prompt (Ramesh et al. 2021, section 2.6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn


def clip_score(
    model: nn.Module, tokenizer: Any, transform: Callable[[Image.Image], Tensor]
) -> Callable[[str, list[Image.Image]], list[float]]:
    """A matching model, its tokenizer and transform -> the `rerank=` of every model's `generate`: (prompt, n pictures)
    -> n cosines, or 0 for an empty prompt, which every picture fits."""

    @torch.inference_mode()
    def score(prompt: str, pictures: list[Image.Image]) -> list[float]:
        if not prompt.strip():
            return [0.0] * len(pictures)
        device = next(model.parameters()).device
        images = torch.stack([transform(picture) for picture in pictures]).to(device)
        tokens = tokenizer.tokenize_as_tensor([prompt]).to(device)
        return torch.cosine_similarity(model.encode_image(images).float(), model.encode_text(tokens).float()).tolist()

    return score
