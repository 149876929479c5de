"""The safety checker of Stable Diffusion: which pictures lie near embeddings of what should not be drawn (CompVis/
stable-diffusion-safety-checker; Rando et al. 2022 say what it finds and what it misses).

B pictures, E width of CLIP's embeddings, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.models.clip import VisionTransformer, VitConfig

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
STRICTER = 0.01  # by so much where a picture is near one of the concepts of special care


@dataclass(frozen=True, kw_only=True)
class SafetyCheckerConfig:
    """Sizes; the defaults are the published ones. `concepts`, and those of `special` care."""

    image: VitConfig = VitConfig(patch=14, width=1024, depth=24, heads=16)
    embed: int = 768
    concepts: int = 17
    special: int = 3

    @classmethod
    def from_dict(cls, sizes: Mapping) -> SafetyCheckerConfig:
        """The config that `dataclasses.asdict` says. Unknown names raise TypeError."""
        return cls(**{name: VitConfig(**value) if name == "image" else value for name, value in sizes.items()})


class SafetyChecker(nn.Module):
    """CLIP's image tower, and embeddings of concepts with a threshold each, which were published without names."""

    def __init__(self, config: SafetyCheckerConfig):
        super().__init__()
        self.config = config
        self.image = VisionTransformer(config.image, config.embed)
        for name, count in (("concepts", config.concepts), ("special", config.special)):
            setattr(self, name, nn.Parameter(torch.ones(count, config.embed), requires_grad=False))
            setattr(self, f"{name}_thresholds", nn.Parameter(torch.ones(count), requires_grad=False))

    @property
    def image_size(self) -> int:
        """The side in pixels of the pictures it takes."""
        return self.config.image.size

    @torch.inference_mode()
    def check(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of 0..1 -> whether each should not be shown, (B,). The `check=` of
        `StableDiffusion.generate`."""
        return self.flags(self.prepared(pictures))

    def flags(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, size, size) as CLIP sees them -> whether each should not be shown, (B,)."""
        found = F.normalize(self.image(image.to(self.concepts.dtype)), dim=-1)  # (B, E)
        special = _above(found, self.special, self.special_thresholds, 0.0).any(1)
        return _above(found, self.concepts, self.concepts_thresholds, STRICTER * special[:, None]).any(1)

    def prepared(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of 0..1 -> (B, 3, size, size): the shorter side resized, the centre cut out, with
        CLIP's mean and spread."""
        size, (height, width) = self.image_size, pictures.shape[-2:]
        shorter = min(height, width)
        sides = size * height // shorter, size * width // shorter
        pictures = F.interpolate(pictures.float(), sides, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((side - size) // 2 for side in sides)
        mean, std = (pictures.new_tensor(color)[:, None, None] for color in (MEAN, STD))
        return (pictures[:, :, top : top + size, left : left + size] - mean) / std


def _above(found: Tensor, concepts: Tensor, thresholds: Tensor, stricter: float | Tensor) -> Tensor:
    """(B, E) and (N, E) -> (B, N): whether the cosine is above the threshold, to three places as published."""
    cosines = found.float() @ F.normalize(concepts.float(), dim=-1).T
    return (cosines - thresholds.float() + stricter).round(decimals=3) > 0
