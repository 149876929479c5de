"""Classifier-free guidance of a diffusion model's output (Ho and Salimans 2022)."""

from __future__ import annotations

from torch import Tensor

from zoo.generation.tokens import guide


def guided(unconditional: Tensor, conditional: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """u + scale (c - u), for outputs (B, C, h, w) without and with the prompt.

    `rescale`: how far, from 0 to 1, the result's standard deviation over (C, h, w) is brought back to that of the
    conditional output; 0.7 keeps a model of zero terminal SNR from over-exposure (Lin et al. 2023, section 3.4).
    """
    output = guide(conditional, unconditional, scale)
    if not rescale:
        return output
    dims = tuple(range(1, output.dim()))
    ratio = conditional.float().std(dims, keepdim=True) / output.float().std(dims, keepdim=True)
    return output * (rescale * ratio + 1 - rescale).to(output.dtype)
