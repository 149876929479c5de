"""How a vocabulary of codes is used."""

from __future__ import annotations

import torch
from torch import Tensor


def usage(codes: Tensor, vocab: int) -> dict[str, float]:
    """Codes of any shape -> "code_usage", the part of the vocabulary that occurs, and "code_perplexity", how many
    equally frequent codes would be as uncertain: `vocab` at best, 1 if all are the same."""
    counts = torch.bincount(codes.flatten(), minlength=vocab).double()
    share = counts / counts.sum()
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    return {"code_usage": float((counts > 0).double().mean()), "code_perplexity": float(entropy.exp())}
