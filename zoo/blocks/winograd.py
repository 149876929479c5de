"""3x3 convolutions with 16 multiplications for every four outputs in place of 36 (Winograd 1980; Lavin and Gray 2015,
F(2x2, 3x3)). Outputs are cut into tiles of 2 x 2, each of which reads 4 x 4 inputs.

B batch, C channels in, K channels out, H W places.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The three transforms of the paper's equation 8, each for both directions at once: (16, 16), (16, 9), (4, 16). They are
# fp32 on the CPU also where this is imported under another default.
_TRANSFORMS = (
    [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
    [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]],
    [[1, 1, 1, 0], [0, 1, -1, -1]],
)
TILE, KERNEL, OUTPUT = (
    torch.kron(m, m) for m in (torch.tensor(rows, dtype=torch.float32, device="cpu") for rows in _TRANSFORMS)
)
NUMBERS_AT_ONCE = 1 << 21  # of transformed inputs, so that they stay in the cache


def transform(weight: Tensor) -> Tensor:
    """A kernel (K, C, 3, 3) in fp32 -> what `convolve` takes, (16, K, C)."""
    return (KERNEL @ weight.reshape(-1, 9).t()).view(16, *weight.shape[:2])


def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """(B, C, H, W), fp32 -> (B, K, H, W), channels last; one zero is padded at each side. `kernel`: of `transform`."""
    batch, channels, height, width = x.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2  # of tiles
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1 + width % 2, 1, 1 + height % 2))  # (B, 2 rows + 2, 2 columns + 2, C)
    image, line, place, _ = x.stride()
    out = x.new_empty(batch, 2 * rows, 2 * columns, kernel.shape[1])
    some = max(1, NUMBERS_AT_ONCE // (16 * batch * columns * max(kernel.shape[1:])))
    for start in range(0, rows, some):
        count = min(some, rows - start)
        shape = (4, 4, batch, count, columns, channels)
        tiles = x.as_strided(shape, (line, place, image, 2 * line, 2 * place, 1), x.storage_offset() + 2 * start * line)
        tiles = (TILE @ tiles.reshape(16, -1)).view(16, -1, channels)
        found = OUTPUT @ torch.bmm(tiles, kernel.transpose(1, 2)).view(16, -1)
        found = found.view(2, 2, batch, count, columns, -1).permute(2, 3, 0, 4, 1, 5)
        out[:, 2 * start : 2 * (start + count)].view(found.shape).copy_(found)
    out = out[:, :height, :width].permute(0, 3, 1, 2)
    return out if bias is None else out.add_(bias[:, None, None])
