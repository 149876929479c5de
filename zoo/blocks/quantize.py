"""Latents <-> codes, the rows of a learned book. B batch, D width of a row, V rows, h w latents, N places of a batch.

The names of parts are those of CompVis/taming-transformers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.distributed import rank, total, world_size

ROOM = 1 << 26  # products of latents and rows held at once: 256 MiB
COUNTING = 0.99  # the decay of the counts of rows that are trained by gradients
SMOOTHING = 1e-5  # added to the counts of rows that follow their latents (Sonnet's VectorQuantizerEMA)
GUMBEL_KL = 5e-4  # taming's kl_weight


class Quantized(NamedTuple):
    """What training needs of quantised latents."""

    rows: Tensor  # (B, D, h, w); their gradient goes to the latents, as if nothing stood between (straight-through)
    codes: Tensor  # (B, h, w)
    loss: Tensor  # (), in fp32


class VectorQuantizer(nn.Module):
    """The nearest row (van den Oord et al. 2017).

    `codebook` draws rows to latents and `commitment` latents to rows. With `decay` rows follow a moving average of the
    latents that chose them instead (appendix A.1 there). With `restart` a row that is chosen fewer times per forward,
    on average and by all ranks together, is put where a random latent lies (Dhariwal et al. 2020, Jukebox): keep it
    well below the number of latents per row, which is what a row gets on average. Both happen in training only.
    """

    def __init__(
        self,
        vocab: int,
        width: int,
        *,
        codebook: float = 1.0,
        commitment: float = 0.25,
        decay: float = 0.0,
        restart: float = 0.0,
    ):
        super().__init__()
        self.codebook, self.commitment, self.decay, self.restart = codebook, commitment, decay, restart
        self.embedding = nn.Embedding(vocab, width)
        self.reset_parameters()
        self.embedding.weight.requires_grad_(not decay)
        if decay or restart:
            self.register_buffer("counts", torch.zeros(vocab))  # latents that chose a row; all 0 before the first
        if decay:
            self.register_buffer("sums", torch.zeros(vocab, width))  # of those latents

    def reset_parameters(self) -> None:
        limit = 1 / len(self.embedding.weight)
        nn.init.uniform_(self.embedding.weight, -limit, limit)

    def project(self, x: Tensor, dim: int) -> Tensor:
        """Vectors along `dim` -> what is compared of them: here all."""
        return x

    @torch.no_grad()
    def encode(self, latents: Tensor) -> Tensor:
        """(B, D, h, w) -> the nearest rows (B, h, w)."""
        # |z - e|^2 = |z|^2 - 2 (z e - |e|^2 / 2), whose first term is the same for all rows. In full precision, since
        # rows lie closer together than half precision can tell.
        with torch.autocast(latents.device.type, enabled=False):
            book = self.project(self.embedding.weight.float(), 1)
            offset = book.square().sum(1) / -2
            points = self.project(latents.float(), 1).movedim(1, -1).flatten(0, -2)  # (N, D)
            parts = points.split(max(1, ROOM // len(book)))
            codes = torch.cat([torch.addmm(offset, part, book.T).argmax(1) for part in parts])
        return codes.view(len(latents), *latents.shape[2:])

    def decode(self, codes: Tensor) -> Tensor:
        """(B, h, w) -> their rows (B, D, h, w)."""
        return self.project(self.embedding(codes), -1).movedim(-1, 1)

    def forward(self, latents: Tensor) -> Quantized:
        """(B, D, h, w) -> the nearest rows. In training, what `decay` and `restart` ask for comes after."""
        codes = self.encode(latents)
        with torch.autocast(latents.device.type, enabled=False):
            # Contiguous: torch's backward of a group norm is 25 times slower on a CPU where channels come last.
            rows, points = self.decode(codes).contiguous(), self.project(latents.float(), 1)
            loss = self.commitment * F.mse_loss(points, rows.detach().float())
            if not self.decay:
                loss = loss + self.codebook * F.mse_loss(rows.float(), points.detach())
            if self.training and (self.decay or self.restart):
                # Backward needs the rows looked up above, which are copies: the book is free to change.
                self._follow(points.detach().movedim(1, -1).flatten(0, -2), codes.flatten())
            through = (points - points.detach()).to(rows.dtype)  # 0, so that the rows are exactly those of `decode`
        return Quantized(rows.detach() + through, codes, loss)

    @torch.no_grad()
    def _follow(self, points: Tensor, codes: Tensor) -> None:
        """Counts which rows (N,) these latents (N, D) chose, on all ranks, and moves the rows."""
        if total(points.isfinite().logical_not().sum()):
            return  # the trainer leaves such an update out, but an average would never forget it
        book = self.embedding.weight
        chosen = total(codes.bincount(minlength=len(book)).float())
        share, decay = chosen.mean(), self.decay or COUNTING
        if not self.counts.any():
            self.counts += share
            if self.decay:
                self.sums += share * self.project(book, 1)
        self.counts.lerp_(chosen, 1 - decay)
        if self.decay:
            self.sums.lerp_(total(torch.zeros_like(self.sums).index_add_(0, codes, points)), 1 - decay)
            # No row is divided by 0; the counts' sum stays (Sonnet; Razavi et al. 2019).
            count = self.counts.sum()
            smooth = (self.counts + SMOOTHING) / (count + len(book) * SMOOTHING) * count
            book.copy_(self.project(self.sums / smooth[:, None], 1))
        if self.restart:
            self._restart(points, share)

    def _restart(self, points: Tensor, share: Tensor) -> None:
        """Puts rows that are hardly chosen where latents (N, D) lie, with the count of an average row, `share`."""
        unused = (self.counts < self.restart).nonzero()[:, 0]  # (U,), the same on every rank
        if not len(unused):
            return
        latents, first = len(points) * world_size(), len(points) * rank()
        # Without repeats while there are enough, for of two equal rows one is never chosen. Rank 0's draw counts.
        draw = torch.randperm(latents).repeat(-(-len(unused) // latents))[: len(unused)].to(points.device)
        place = total(draw * (rank() == 0)) - first
        mine = (place >= 0) & (place < len(points))
        found = total(points[place.clamp(0, len(points) - 1)] * mine[:, None])  # (U, D)
        self.embedding.weight[unused] = found.to(self.embedding.weight.dtype)
        self.counts[unused] = share
        if self.decay:
            self.sums[unused] = share * found


class CosineQuantizer(VectorQuantizer):
    """The row of the nearest direction: latents and rows have length 1 (Yu et al. 2021, ViT-VQGAN).

    Made for few dimensions: 32 there. Gradients go through the latents' normalisation.
    """

    def reset_parameters(self) -> None:
        nn.init.normal_(self.embedding.weight)  # all directions alike

    def project(self, x: Tensor, dim: int) -> Tensor:
        """Vectors along `dim` -> their directions."""
        return F.normalize(x, dim=dim)


class GumbelQuantizer(nn.Module):
    """A categorical distribution over the rows; its likeliest is the code (Jang et al. 2016).

    Training draws from it: a mixture of rows, or with `hard` one of them, straight-through. taming's own evaluation
    draws too.
    """

    hard = False

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

    def forward(self, latents: Tensor, temperature: float = 1.0) -> Quantized:
        """(B, D, h, w) -> in training rows drawn at a temperature, in evaluation the likeliest; the likeliest codes.

        The loss draws the distribution to the uniform one, by their KL divergence (taming).
        """
        logits = self.proj(latents)  # (B, V, h, w)
        codes = logits.argmax(1)
        with torch.autocast(latents.device.type, enabled=False):
            q = logits.float().softmax(1)
            loss = GUMBEL_KL * (q * (q * q.shape[1] + 1e-10).log()).sum(1).mean()
            if not self.training:
                return Quantized(self.decode(codes), codes, loss)
            drawn = F.gumbel_softmax(logits.float(), temperature, self.hard, dim=1)
            rows = torch.einsum("bvhw,vd->bdhw", drawn.to(self.embed.weight.dtype), self.embed.weight)
        return Quantized(rows, codes, loss)
