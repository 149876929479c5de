"""LoRA: frozen linear layers, each with a small trainable product of two matrices beside it (Hu et al. 2021).

r the rank: what the product passes through.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import SettingsError

JOINED = {"qkv": 3}  # layers that are so many in one: those of blocks.transformer.Attention


class Parts(nn.Linear):
    """Equal parts of its rows each read their part of the input: (..., parts * in) -> (..., out)."""

    def __init__(self, width: int, out: int, parts: int, **place: object):
        super().__init__(width, out, bias=False, **place)
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(x.chunk(self.parts, -1), self.weight.chunk(self.parts), strict=True)
        return torch.cat([F.linear(part, weight) for part, weight in pairs], -1)


class LoraLinear(nn.Module):
    """base(x) + scale * up(down(x)), of which only `down` (r, in) and `up` (out, r) are trained.

    `up` begins at 0, so that training begins where the base was left. Both are fp32 whatever the base is, since half
    precision would lose small updates. A base of several `parts` has LoRA for each: `down` is (parts * r, in).
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float, parts: int = 1):
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        place = {"device": base.weight.device, "dtype": torch.float32}
        # Drawn as nn.Linear is, as published.
        self.down = nn.Linear(base.in_features, parts * rank, bias=False, **place)
        self.up = Parts(rank, base.out_features, parts, **place)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y = self.base(x)
        return y + self.scale * self.up(self.down(x.to(self.down.weight.dtype))).to(y.dtype)


def add_lora(module: nn.Module, targets: Sequence[str], rank: int, alpha: float | None = None) -> list[nn.Parameter]:
    """Freezes all of `module` and puts LoRA of that rank around its linear layers -> the parameters to train.

    `targets`: names of layers, or how they end: ("to_q", "to_k", "to_v", "to_out.0") is a UNet's attention, and
    ("attention.qkv", "attention.out") a text tower's. The scale is alpha / rank; None is a scale of 1. Raises
    SettingsError for a rank below 1, for no such layer, and where there is LoRA already.
    """
    if rank < 1:
        raise SettingsError(f"the rank of a LoRA is 1 or more, not {rank}")
    if _layers(module):
        raise SettingsError("this network has LoRA already: remove_lora first, or name all its layers at once")
    linear = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    chosen = {
        name: layer for name, layer in linear.items() if any(f".{name}".endswith(f".{target}") for target in targets)
    }
    if not chosen:
        ends = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise SettingsError(f"no linear layer ends in {' or '.join(targets) or 'nothing'}; theirs end in: {ends}")
    module.requires_grad_(False)
    scale = 1.0 if alpha is None else alpha / rank
    added = []
    for name, layer in chosen.items():
        lora = LoraLinear(layer, rank, scale, JOINED.get(name.rpartition(".")[2], 1)).train(layer.training)
        _put(module, name, lora)
        added += [lora.down.weight, lora.up.weight]
    return added


def lora_state(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """What was trained, in the names that PEFT and diffusers read: `<prefix><layer>.lora_A.weight` (r, in) and
    `.lora_B.weight` (out, r); the prefix of a UNet is "unet.".

    That layout has no place for alpha, so the scale is multiplied into `lora_B`: every reader then finds the same sum.
    """
    state = {}
    for name, layer in _layers(module).items():
        state[f"{prefix}{name}.lora_A.weight"] = layer.down.weight.detach().clone()
        # Parts are one product too: each of its columns is of one part.
        up = torch.block_diag(*layer.up.weight.detach().chunk(layer.up.parts))
        state[f"{prefix}{name}.lora_B.weight"] = up * layer.scale
    return state


def remove_lora(module: nn.Module) -> None:
    """Puts the linear layers back as they were, without what was trained. All stays frozen: `requires_grad_` says
    otherwise."""
    for name, layer in _layers(module).items():
        _put(module, name, layer.base)


def _layers(module: nn.Module) -> dict[str, LoraLinear]:
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLinear)}


def _put(module: nn.Module, name: str, layer: nn.Module) -> None:
    above, _, last = name.rpartition(".")
    setattr(module.get_submodule(above), last, layer)
