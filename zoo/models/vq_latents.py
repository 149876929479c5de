"""A VQGAN as the first stage of latent diffusion: latents before they are quantised, which decoding does (Rombach et
al. 2022, section 3.1, "VQ-reg."; CompVis/latent-diffusion, VQModelInterface).

B batch, C latent channels, H W pixels, h w latents.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from zoo.models.kl_vae import KlVae, KlVaeConfig
from zoo.models.vqgan import Vqgan, VqganConfig

SURE = -30.0  # the logarithm of a variance that is none


class VqLatents(Vqgan):
    """Picture <-> grid of latents, with the names that KlVae has."""

    @property
    def factor(self) -> int:
        """How many pixels of a side are one latent."""
        return 1 << (len(self.config.widths) - 1)

    @property
    def scale(self) -> float:
        """What latents are multiplied with for a diffusion model: nothing, as published."""
        return 1.0

    @property
    def channels(self) -> int:
        """The numbers of one latent."""
        return self.config.code_width

    def moments(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of 0..1 -> latents (B, 2 C, h, w), and the logarithm of the variance that they do not
        have."""
        latents = self.latents(image)
        return torch.cat([latents, torch.full_like(latents, SURE)], 1)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures (B, 3, H, W) of 0..1 -> latents (B, C, h, w), not quantised; noise changes nothing."""
        return self.latents(image)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pictures (B, 3, H, W) of 0..1 of the codes nearest to them."""
        codes = self.quantize.encode(latents.to(self.decoder.conv_in.weight.dtype))
        return self.draw(self.quantize.decode(codes))


def vae_config(sizes: Mapping) -> KlVaeConfig | VqganConfig:
    """The config that `dataclasses.asdict` says. Unknown names raise TypeError."""
    return (VqganConfig if "vocab" in sizes else KlVaeConfig).from_dict(sizes)


def build_vae(config: KlVaeConfig | VqganConfig) -> KlVae | VqLatents:
    """The first stage of that config."""
    return (VqLatents if isinstance(config, VqganConfig) else KlVae)(config)


def latents_of(vqgan: Vqgan) -> VqLatents:
    """A VQGAN as a first stage, with its weights."""
    made = VqLatents(vqgan.config)
    made.load_state_dict(vqgan.state_dict())
    return made
