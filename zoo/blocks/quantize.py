"""Latents <-> codes, the rows of a learned book. B batch, D width of a row, V rows, h w latents, N places of a batch.

The names of parts are those of CompVis/taming-transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

ROOM = 1 << 26  # products of latents and rows held at once: 256 MiB


class VectorQuantizer(nn.Module):
    """The nearest row (van den Oord et al. 2017)."""

    def __init__(self, vocab: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        nn.init.uniform_(self.embedding.weight, -1 / vocab, 1 / vocab)

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) -> the nearest rows (B, h, w)."""
        # |z - e|^2 = |z|^2 - 2 (z e - |e|^2 / 2), whose first term is the same for all rows. In full precision, since
        # rows lie closer together than half precision can tell.
        with torch.autocast(latents.device.type, enabled=False):
            book = self.embedding.weight.float()
            offset = book.square().sum(1) / -2
            rows = latents.float().movedim(1, -1).flatten(0, -2)  # (N, D)
            parts = rows.split(max(1, ROOM // len(book)))
            codes = torch.cat([torch.addmm(offset, part, book.T).argmax(1) for part in parts])
        return codes.view(len(latents), *latents.shape[2:])

    def decode(self, codes: Tensor) -> Tensor:
        """(B, h, w) -> their rows (B, D, h, w)."""
        return self.embedding(codes).movedim(-1, 1)


class GumbelQuantizer(nn.Module):
    """A categorical distribution over the rows; its likeliest is the code (Jang et al. 2016).

    taming's own evaluation draws a row instead.
    """

    def __init__(self, vocab: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(width, vocab, 1)
        self.embed = nn.Embedding(vocab, width)

    def encode(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) -> the likeliest rows (B, h, w)."""
        return self.proj(latents).argmax(1)

    def decode(self, codes: Tensor) -> Tensor:
        """(B, h, w) -> their rows (B, D, h, w)."""
        return self.embed(codes).movedim(-1, 1)
