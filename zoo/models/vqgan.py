"""VQGAN: pictures <-> codes through a convolutional autoencoder (Esser et al. 2021, CompVis/taming-transformers).

B batch, C latent channels, D width of a code, H W pixels, h w codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks.autoencoder import Decoder, Encoder
from zoo.blocks.quantize import CosineQuantizer, GumbelQuantizer, VectorQuantizer
from zoo.errors import SettingsError

QUANTIZERS = {"vq": VectorQuantizer, "cosine": CosineQuantizer, "gumbel": GumbelQuantizer}


@dataclass(frozen=True, kw_only=True)
class VqganConfig:
    """Sizes. `size`: the side in pixels of the pictures it takes. `widths`: the channels of each level, the first at
    full resolution and each further one at half the one before. `blocks` of each level; `attention`: the levels that
    have it. `latent`: channels between the halves. `vocab` codes of `code_width` each, by a `quantizer` "vq" (the
    nearest), "cosine" (that of the nearest direction) or "gumbel" (the likeliest). `black`: the value of black in the
    network, where white is 1. `encoder`: false for weights published without one. `haar`: the decoder gives a wavelet's
    bands, so pictures of twice the side. `eps` of the norms: 1e-6, and 1e-5 in CLIP-GEN's release; their `groups`.

    How a "vq" or "cosine" is trained: `codebook` draws rows to latents and `commitment` latents to rows; taming's runs
    had 0.25 and 1, CLIP-GEN's 0.2 and 1. `decay`, `restart`: see `zoo.blocks.quantize`.
    """

    size: int = 256
    widths: tuple[int, ...] = (128, 128, 256, 256, 512)
    blocks: int = 2
    attention: tuple[int, ...] = (4,)
    latent: int = 256
    vocab: int = 16384
    code_width: int = 256
    quantizer: str = "vq"
    black: float = -1.0
    encoder: bool = True
    haar: bool = False
    eps: float = 1e-6
    groups: int = 32
    codebook: float = 1.0
    commitment: float = 0.25
    decay: float = 0.0
    restart: float = 0.0

    @classmethod
    def from_dict(cls, sizes: Mapping) -> VqganConfig:
        """The config that `dataclasses.asdict`, and so a config.json, says. Unknown names raise TypeError."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()})


class Vqgan(nn.Module):
    """Picture <-> grid of codes."""

    def __init__(self, config: VqganConfig):
        super().__init__()
        if config.quantizer not in QUANTIZERS:
            raise SettingsError(f"quantizer={config.quantizer!r} is not one of {', '.join(QUANTIZERS)}")
        self.config = config
        sizes = {name: getattr(config, name) for name in ("widths", "blocks", "attention", "eps", "groups")}
        self.encoder = Encoder(**sizes, out=config.latent) if config.encoder else None
        self.quant_conv = nn.Conv2d(config.latent, config.code_width, 1) if config.encoder else None
        learning = dict(
            codebook=config.codebook, commitment=config.commitment, decay=config.decay, restart=config.restart
        )
        learning = {} if config.quantizer == "gumbel" else learning
        self.quantize = QUANTIZERS[config.quantizer](config.vocab, config.code_width, **learning)
        self.post_quant_conv = nn.Conv2d(config.code_width, config.latent, 1)
        self.decoder = Decoder(**sizes, channels=config.latent, out=12 if config.haar else 3)

    @property
    def image_size(self) -> int:
        """The side in pixels of the pictures it takes; with `haar` it gives them back twice as large."""
        return self.config.size

    @property
    def grid(self) -> int:
        """The side of the grid of codes."""
        return self.config.size >> (len(self.config.widths) - 1)

    @property
    def vocab(self) -> int:
        """How many codes there are."""
        return self.config.vocab

    def latents(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of 0..1 -> latents (B, D, h, w) before they are quantised.

        Raises SettingsError if there is no encoder.
        """
        if self.encoder is None:
            raise SettingsError("this VQGAN was published without its encoder: it can only decode")
        black = self.config.black
        image = image.to(self.encoder.conv_in.weight.dtype) * (1 - black) + black
        return self.quant_conv(self.encoder(image))

    def encode(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of 0..1 -> codes (B, h, w). Raises SettingsError if there is no encoder."""
        return self.quantize.encode(self.latents(image))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> pictures (B, 3, H, W) of 0..1; with `haar` (B, 3, 2 H, 2 W)."""
        return self.draw(self.quantize.decode(codes))

    def draw(self, rows: Tensor) -> Tensor:
        """Rows of the code book (B, D, h, w) -> pictures, as `decode` gives them; with gradient."""
        image = self.decoder(self.post_quant_conv(rows))
        image = inverse_haar(image) if self.config.haar else image
        black = self.config.black
        return (image.clamp(black, 1) - black) / (1 - black)

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight that pictures come out of."""
        return self.decoder.conv_out.weight

    def forward(self, image: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
        """Pictures (B, 3, H, W) of 0..1 -> "loss" and its parts, "pixel", the mean absolute difference in -1..1, and
        "quantizer"; "perplexity", as how many codes evenly used those of the batch are; for a discriminator "image",
        what was drawn, and "target", both (B, 3, H, W) of -1..1.

        `temperature`: of the draw of a "gumbel". Raises SettingsError for weights that were published for drawing only.
        """
        if self.config.haar:
            raise SettingsError("this VQGAN draws a wavelet's bands, and was published to draw with, not to be trained")
        black, draw = self.config.black, self.config.quantizer == "gumbel"
        latents = self.latents(image)
        quantized = self.quantize(latents, temperature) if draw else self.quantize(latents)
        found = self.decoder(self.post_quant_conv(quantized.rows)).float()
        drawn, target = (found - black) / (1 - black) * 2 - 1, image.float() * 2 - 1
        pixel = (drawn - target).abs().mean()
        return {
            "loss": pixel + quantized.loss,
            "pixel": pixel,
            "quantizer": quantized.loss,
            "perplexity": perplexity(quantized.codes, self.vocab),
            "image": drawn,
            "target": target,
        }

    def reconstruct(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of 0..1 -> what is left of them after encoding and decoding."""
        return self.decode(self.encode(image))


def perplexity(codes: Tensor, vocab: int) -> Tensor:
    """Codes -> e to the entropy of how often each is used: 1 for a single one, `vocab` where all are used alike."""
    share = codes.flatten().bincount(minlength=vocab) / codes.numel()
    return (-torch.special.xlogy(share, share)).sum().exp()


def inverse_haar(bands: Tensor) -> Tensor:
    """The bands of a one-level Haar transform (B, 12, H, W) -> pictures (B, 3, 2 H, 2 W).

    First the averages of red, green and blue, then of each its differences from row to row, from column to column, and
    of both (ai-forever/ru-dalle, rudalle/vae/decoder_dwt.py).
    """
    averages, differences = bands.split([3, 9], 1)
    mixed = torch.cat([averages.unsqueeze(2), differences.unflatten(1, (3, 3))], 2)  # (B, 3, 4, H, W)
    # Each row is a pixel of the square of four that the bands describe, in reading order.
    signs = mixed.new_tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
    return F.pixel_shuffle(torch.einsum("pf,bcfhw->bcphw", signs / 2, mixed).flatten(1, 2), 2)
