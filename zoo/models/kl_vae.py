"""KL-VAE: pictures <-> latents through a convolutional autoencoder with a small KL term (Rombach et al. 2022, section
3.1, CompVis/latent-diffusion). It is the first stage of Stable Diffusion.

B batch, C latent channels, H W pixels, h w latents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoo.blocks.autoencoder import Decoder, Encoder
from zoo.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class KlVaeConfig:
    """Sizes; the defaults are Stable Diffusion's kl-f8. `size`: the side in pixels of the pictures that `transform`
    gives, of which any multiple of the scale factor can be encoded. `widths`: the channels of each level, the first at
    full resolution and each further one at half the one before. `blocks` of each level; `attention`: the levels that
    have it. `latent`: channels of a latent. `eps` and `groups` of the norms. `quant`: without it the two 1x1
    convolutions between the halves and the latents are left out, as in later autoencoders.

    `scale`: what latents are multiplied with for a diffusion model, one over their standard deviation; `encode` and
    `decode` do not. `kl_weight`: of the KL term in the training loss, which is summed over a picture and averaged.
    """

    size: int = 512
    widths: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    attention: tuple[int, ...] = ()
    latent: int = 4
    eps: float = 1e-6
    groups: int = 32
    quant: bool = True
    scale: float = 0.18215
    kl_weight: float = 1e-6

    @classmethod
    def from_dict(cls, sizes: Mapping) -> KlVaeConfig:
        """The config that `dataclasses.asdict`, and so a config.json, says. Unknown names raise TypeError."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()})


class KlVae(nn.Module):
    """Picture <-> grid of latents."""

    def __init__(self, config: KlVaeConfig):
        super().__init__()
        self.config = config
        sizes = {name: getattr(config, name) for name in ("widths", "blocks", "attention", "eps", "groups")}
        self.encoder = Encoder(**sizes, out=2 * config.latent)
        self.quant_conv = nn.Conv2d(2 * config.latent, 2 * config.latent, 1) if config.quant else nn.Identity()
        self.post_quant_conv = nn.Conv2d(config.latent, config.latent, 1) if config.quant else nn.Identity()
        self.decoder = Decoder(**sizes, channels=config.latent)

    @property
    def image_size(self) -> int:
        """The side in pixels of the pictures that it was trained on."""
        return self.config.size

    @property
    def factor(self) -> int:
        """How many pixels of a side are one latent."""
        return 1 << (len(self.config.widths) - 1)

    @property
    def grid(self) -> int:
        """The side of the grid of latents of a picture of `image_size`."""
        return self.config.size // self.factor

    @property
    def scale(self) -> float:
        """What latents are multiplied with for a diffusion model."""
        return self.config.scale

    @property
    def channels(self) -> int:
        """The numbers of one latent."""
        return self.config.latent

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that pictures come out of."""
        return self.decoder.conv_out.weight

    def moments(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of 0..1 -> mean and logarithm of the variance of their latents, (B, 2 C, h, w).

        Raises SettingsError for sides that are not multiples of the factor.
        """
        if any(side % self.factor for side in image.shape[-2:]):
            height, width = image.shape[-2:]
            raise SettingsError(
                f"a picture of {width} x {height} pixels: its sides must be multiples of {self.factor}; resize or crop"
            )
        image = image.to(self.encoder.conv_in.weight.dtype) * 2 - 1
        return self.quant_conv(self.encoder(image))

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures (B, 3, H, W) of 0..1 -> latents (B, C, h, w): their mean or, with standard normal `noise` of that
        shape, a sample."""
        return sample_moments(self.moments(image), noise)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pictures (B, 3, H, W) of 0..1."""
        return (self.draw(latents).clamp(-1, 1) + 1) / 2

    def draw(self, latents: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> pictures (B, 3, H, W) of about -1..1, as the decoder gives them."""
        return self.decoder(self.post_quant_conv(latents.to(self.decoder.conv_in.weight.dtype)))

    def reconstruct(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of 0..1 -> what is left of them after encoding and decoding."""
        return self.decode(self.encode(image))

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """Pictures (B, 3, H, W) of 0..1 -> "loss" and its parts, "pixel", the mean absolute difference in -1..1, and
        "kl", in nats per picture; "std", the spread of the latents, one over the `scale` that a diffusion model needs;
        for a discriminator "image", what was drawn, and "target", both (B, 3, H, W) of -1..1."""
        moments = self.moments(image)
        mean, logvar = halves(moments)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
        latents = sample_moments(moments, torch.randn_like(mean))
        drawn, target = self.draw(latents).float(), image.float() * 2 - 1
        pixel = (drawn - target).abs().mean()
        # The source weighs sums over a picture's pixels and latents; this is the same, divided by the pixels.
        loss = pixel + self.config.kl_weight * kl.float() / image[0].numel()
        return {
            "loss": loss,
            "pixel": pixel,
            "kl": kl,
            "std": latents.detach().float().std(),
            "image": drawn,
            "target": target,
        }


def halves(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Moments (B, 2 C, h, w) -> mean and logarithm of the variance, each (B, C, h, w), in fp32; the latter within
    -30..20, as published."""
    mean, logvar = moments.float().chunk(2, 1)
    return mean, logvar.clamp(-30, 20)


def sample_moments(moments: Tensor, noise: Tensor | None = None) -> Tensor:
    """Moments (B, 2 C, h, w) and standard normal noise (B, C, h, w) -> latents (B, C, h, w); without noise their
    mean."""
    mean, logvar = halves(moments)
    latents = mean if noise is None else mean + (0.5 * logvar).exp() * noise
    return latents.to(moments.dtype)
