"""What makes training faster and is not part of the model: lines of code for its owner."""

from __future__ import annotations

import torch
from torch import nn


def advice_for(model: nn.Module) -> tuple[str, ...]:
    """Lines that fit the device and the numbers of this model, each with its reason."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    whole = any(p.dtype == torch.float32 for p in model.parameters())
    lines = []
    if any(p.requires_grad for p in model.parameters()):
        lines.append("torch.optim.AdamW(model.parameters(), fused=True)  # one kernel updates all parameters")
    if whole and has_bf16(device):
        lines.append(
            f'torch.autocast("{device.type}", torch.bfloat16)  # this {device.type} multiplies bf16 in hardware'
        )
    if whole and has_tf32(device) and torch.get_float32_matmul_precision() == "highest":
        lines.append('torch.set_float32_matmul_precision("high")  # TF32 products, exact to three digits')
    return tuple(lines)


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def has_tf32(device: torch.device) -> bool:
    """Whether the hardware has TF32: NVIDIA since Ampere."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)
