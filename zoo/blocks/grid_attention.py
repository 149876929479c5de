"""Sparse attention over a caption and the grid of a picture (Ramesh et al. 2021, figure 11).

Tokens are T text tokens, then N = grid * grid image tokens in raster order. A text token looks at the text up to
itself; an image token looks at all text, at itself, and at earlier image tokens of its pattern:

    full    all of them
    row     the last `grid`, back to the one above it: they wrap from row to row
    column  those above it
    conv    those within a square of `kernel`, at distances counted in raster order, so that the square's edges wrap to
            the neighbouring row; "conv_torus" wraps within the row, and from the last rows to the first (ruDALL-E's
            second weights); "conv_clamped" does not wrap (its third)
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import SettingsError

PATTERNS = ("full", "row", "column", "conv", "conv_torus", "conv_clamped")
SPLIT_FROM = 256  # image tokens from which computing parts is faster than computing all and hiding most


def paper_patterns(depth: int, conv: str = "conv") -> tuple[str, ...]:
    """The pattern of each layer: conv in the last, of the others the second of every four column, the rest row."""
    inner = ["column" if layer % 4 == 1 else "row" for layer in range(depth - 1)]
    return (*inner, conv)


@lru_cache(maxsize=64)
def image_mask(pattern: str, grid: int, kernel: int = 11) -> Tensor:
    """Bool (N, N): true where the image token of the row may look at that of the column. Raises SettingsError."""
    if pattern not in PATTERNS:
        raise SettingsError(f"no attention pattern {pattern!r}: choose one of {', '.join(PATTERNS)}")
    place = torch.arange(grid * grid)
    back = place[:, None] - place[None, :]  # how much earlier the key is
    row, column = place // grid, place % grid
    causal, half = back >= 0, kernel // 2
    if pattern == "full":
        return causal
    if pattern == "row":
        return causal & (back <= grid)
    if pattern == "column":
        return causal & (back % grid == 0)
    if pattern == "conv":
        across = torch.arange(-half, half + 1)
        window = (torch.arange(half + 1)[:, None] * grid + across).flatten()  # the distances, in raster order
        return causal & torch.isin(back, window)
    down, across = (axis[:, None] - axis[None, :] for axis in (row, column))
    if pattern == "conv_torus":
        down, across = ((d + half) % grid - half for d in (down, across))
    return causal & (down.abs() <= half) & (across.abs() <= half)


@lru_cache(maxsize=64)
def whole_mask(pattern: str, text: int, grid: int, kernel: int = 11) -> Tensor:
    """Bool (T + N, T + N): true where the token of the row may look at that of the column."""
    mask = torch.ones(text + grid * grid, text + grid * grid, dtype=torch.bool).tril()
    mask[text:, text:] = image_mask(pattern, grid, kernel)
    return mask


@lru_cache(maxsize=64)
def visible(pattern: str, grid: int, kernel: int = 11) -> tuple[Tensor, Tensor]:
    """For each image token the places of those it looks at, int64 (N, K), earliest first, and additive masks (N, K):
    0, or -inf at the places that only fill the row up to the longest's K."""
    mask = image_mask(pattern, grid, kernel)
    longest = int(mask.sum(1).max())
    order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    hidden = torch.zeros(order.shape).masked_fill_(~mask.gather(1, order), float("-inf"))
    return order, hidden


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: str, text: int, grid: int, kernel: int = 11) -> Tensor:
    """Queries, keys and values (B, H, T + N, d) -> what each token gathers (B, H, T + N, d)."""
    if pattern == "full":
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if q.device.type == "cpu" and q.dtype != torch.float64 and text and grid * grid >= SPLIT_FROM:
        return _Split.apply(q, k, v, pattern, text, grid, kernel)
    mask = whole_mask(pattern, text, grid, kernel).to(q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


# --- in parts --------------------------------------------------------------------------------------------------------
class _Split(torch.autograd.Function):
    """Attention as a few dense ones over parts of the tokens, put together by their log-sum-exps: no product is formed
    that the pattern hides, and no more is kept for the backward pass than by dense attention.

    Backward, each part is told the whole's output and log-sum-exp, from which it makes its own probabilities.
    """

    @staticmethod
    def forward(ctx, q, k, v, pattern, text, grid, kernel):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.full(q.shape[:-1], float("-inf"), dtype=torch.float32)
        for part in _parts(pattern, text, grid, kernel):
            parts = part.queries(q), part.keys(k), part.keys(v)
            found, weight = _flash(*parts, 0.0, part.causal, attn_mask=part.mask_as(q))
            part.merge(out, lse, found, weight)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout = pattern, text, grid, kernel
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        for part in _parts(*ctx.layout):
            grads = _flash_backward(
                *(part.queries(grad), part.queries(q), part.keys(k), part.keys(v), part.queries(out)),
                *(part.queries(lse[..., None])[..., 0].contiguous(), 0.0, part.causal),
                attn_mask=part.mask_as(q),
            )
            part.add_queries(dq, grads[0])
            part.add_keys(dk, grads[1])
            part.add_keys(dv, grads[2])
        return dq, dk, dv, None, None, None, None


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Part:
    """Queries of one stretch of tokens against keys of another, each whole, or as rows or columns of the grid."""

    def __init__(
        self,
        queries: slice,
        keys: slice,
        shape: tuple[int, bool] | None = None,  # the grid's side, and whether lines are its columns
        mask: Tensor | None = None,
        causal: bool = False,
    ):
        self.at, self.of, self.shape, self.mask, self.causal = queries, keys, shape, mask, causal

    def _cut(self, x: Tensor, where: slice) -> Tensor:
        """(B, H, T + N, d) -> a view of it, (B, H, n, d) or (B, H, lines, n, d)."""
        x = x[:, :, where]
        if self.shape is None:
            return x
        side, by_column = self.shape
        x = x.unflatten(2, (-1, side))
        return x.transpose(2, 3) if by_column else x

    def _lines(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2) if self.shape else x

    def queries(self, x: Tensor) -> Tensor:
        return self._lines(self._cut(x, self.at))

    def keys(self, x: Tensor) -> Tensor:
        return self._lines(self._cut(x, self.of))

    def mask_as(self, x: Tensor) -> Tensor | None:
        return None if self.mask is None else self.mask.to(x.dtype)

    def add_queries(self, total: Tensor, found: Tensor) -> None:
        view = self._cut(total, self.at)
        view += found.reshape(view.shape)

    def add_keys(self, total: Tensor, found: Tensor) -> None:
        view = self._cut(total, self.of)
        view += found.reshape(view.shape)

    def merge(self, out: Tensor, lse: Tensor, found: Tensor, weight: Tensor) -> None:
        """Into the output and log-sum-exp so far."""
        out, lse = self._cut(out, self.at), self._cut(lse[..., None], self.at)
        found, weight = found.reshape(out.shape), weight.reshape(lse.shape)
        if torch.isinf(lse[0, 0].flatten()[0]):  # the first part of these queries
            out.copy_(found), lse.copy_(weight)
            return
        both = torch.logaddexp(lse, weight)
        out.mul_((lse - both).exp_()).add_(found * (weight - both).exp_())
        lse.copy_(both)


@lru_cache(maxsize=64)
def _parts(pattern: str, text: int, grid: int, kernel: int) -> tuple[_Part, ...]:
    captions, picture = slice(0, text), slice(text, text + grid * grid)
    parts = [_Part(captions, captions, causal=True), _Part(picture, captions)]
    if pattern == "row":
        above = torch.zeros(grid, grid).masked_fill_(torch.ones(grid, grid).tril(-1).bool(), float("-inf"))
        later, earlier = slice(text + grid, picture.stop), slice(text, picture.stop - grid)
        parts.append(_Part(picture, picture, (grid, False), causal=True))
        parts.append(_Part(later, earlier, (grid, False), mask=above))
    elif pattern == "column":
        parts.append(_Part(picture, picture, (grid, True), causal=True))
    else:
        mask = torch.zeros(grid**2, grid**2).masked_fill_(~image_mask(pattern, grid, kernel), float("-inf"))
        parts.append(_Part(picture, picture, mask=mask))
    return tuple(parts)
