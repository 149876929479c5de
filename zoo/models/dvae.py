"""The discrete VAE of DALL-E (Ramesh et al. 2021; openai/DALL-E). B batch, V vocabulary, H W pixels, h w codes.

A picture becomes a grid of codes, each one of a vocabulary, and a picture again. In training a code is a mixture that
hardens as the temperature falls (the Gumbel-softmax relaxation), so that gradients pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.blocks.recompute import recompute
from zoo.errors import SettingsError

EPS = 0.1  # pixels are kept this far from 0 and 1, where their logit would be infinite


@dataclass(frozen=True, kw_only=True)
class DvaeConfig:
    """Sizes. `size`: the side of the pictures in pixels, eight times that of the grid for four groups. `hidden`: the
    channels at full resolution, doubled by each group. `stem`: the width of the decoder's code book. `blocks` of each
    group. `decoder`: false for FLAVA's twin, which has none."""

    size: int = 256
    vocab: int = 8192
    hidden: int = 256
    stem: int = 128
    groups: int = 4
    blocks: int = 2
    decoder: bool = True

    @classmethod
    def from_dict(cls, sizes: Mapping) -> DvaeConfig:
        """The config that `dataclasses.asdict`, and so a config.json, says. Unknown names raise TypeError."""
        return cls(**sizes)


def conv(channels_in: int, channels_out: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps the size; weights are drawn from N(0, 1 / fan-in), biases 0, as published."""
    layer = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2)
    nn.init.normal_(layer.weight, std=(channels_in * kernel**2) ** -0.5)
    nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    """identity(x) + gain * path(x); a bottleneck of a quarter of the width, ReLU before each convolution."""

    def __init__(self, channels_in: int, channels_out: int, kernels: tuple[int, ...], gain: float):
        super().__init__()
        widths = [channels_in, *[channels_out // 4] * (len(kernels) - 1), channels_out]
        self.gain = gain
        self.id_path = conv(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()
        self.res_path = nn.ModuleDict(
            {f"conv_{i + 1}": conv(widths[i], widths[i + 1], kernel) for i, kernel in enumerate(kernels)}
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, channels_in, H, W) -> (B, channels_out, H, W)."""
        path = x
        for layer in self.res_path.values():
            path = layer(F.relu(path))
        return torch.add(self.id_path(x), path, alpha=self.gain)


class Tower(nn.Module):
    """A first convolution, groups of residual blocks with a change of resolution between them, a last convolution."""

    def __init__(
        self,
        config: DvaeConfig,
        *,
        first: nn.Module,
        widths: list[int],
        kernels: tuple[int, ...],
        resize: nn.Module,
        out: int,
    ):
        super().__init__()
        gain = (config.groups * config.blocks) ** -2
        self.resize = resize
        self.checkpointing = False
        self.blocks = nn.ModuleDict({"input": first})
        channels = first.out_channels
        for number, width in enumerate(widths, 1):
            group = nn.ModuleDict()
            for block in range(1, config.blocks + 1):
                group[f"block_{block}"] = ResidualBlock(channels, width, kernels, gain)
                channels = width
            self.blocks[f"group_{number}"] = group
        self.blocks["output"] = nn.ModuleDict({"conv": conv(channels, out, 1)})

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H', W')."""
        x = self.blocks["input"](x)
        groups = [group for name, group in self.blocks.items() if name.startswith("group_")]
        for number, group in enumerate(groups):
            for block in group.values():
                x = recompute(block, x) if self.checkpointing and self.training else block(x)
            x = self.resize(x) if number + 1 < len(groups) else x
        # The encoder's logits and the decoder's picture decide in full precision, as published.
        with torch.autocast(x.device.type, enabled=False):
            last = self.blocks["output"]["conv"]
            return last(F.relu(x.to(last.weight.dtype)))


def encoder(config: DvaeConfig) -> Tower:
    """Pictures (B, 3, H, W) of mapped pixels -> logits (B, V, h, w)."""
    widths = [config.hidden * 2**i for i in range(config.groups)]
    return Tower(
        config,
        first=conv(3, config.hidden, 7),
        widths=widths,
        kernels=(3, 3, 3, 1),
        resize=nn.MaxPool2d(2),
        out=config.vocab,
    )


def decoder(config: DvaeConfig) -> Tower:
    """Mixtures of codes (B, V, h, w) -> six maps (B, 6, H, W): the means, in logits of pixels, and log scales."""
    widths = [config.hidden * 2**i for i in reversed(range(config.groups))]
    return Tower(
        config,
        first=conv(config.vocab, config.stem, 1),
        widths=widths,
        kernels=(1, 3, 3, 3),
        resize=nn.Upsample(scale_factor=2, mode="nearest"),
        out=6,
    )


def map_pixels(image: Tensor) -> Tensor:
    """0..1 -> EPS..1 - EPS."""
    return (1 - 2 * EPS) * image + EPS


def unmap_pixels(image: Tensor) -> Tensor:
    """EPS..1 - EPS -> 0..1."""
    return ((image - EPS) / (1 - 2 * EPS)).clamp(0, 1)


def logit_laplace(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """-log of the density of mapped pixels x, each: 1 / (2 b x (1 - x)) exp(-|logit(x) - mean| / b), in nats."""
    logit = torch.logit(x)
    # log x (1 - x) = log sigmoid(logit) + log sigmoid(-logit), which stays exact near 0 and 1.
    volume = F.logsigmoid(logit) + F.logsigmoid(-logit)
    return math.log(2) + log_scale + volume + (logit - mean).abs() * torch.exp(-log_scale)


def kl_to_uniform(logits: Tensor) -> Tensor:
    """(B, V, h, w) -> (B,): the KL divergence of each position's distribution from the uniform one, summed."""
    log_q = F.log_softmax(logits.float(), 1)
    return (log_q.exp() * (log_q + math.log(logits.shape[1]))).sum((1, 2, 3))


def unevenness(logits: Tensor) -> Tensor:
    """(B, V, h, w) -> how far the codes' average distribution over all positions is from the uniform one: a KL
    divergence in nats, 0 if all are used alike and log V if one is used alone."""
    mean = logits.float().softmax(1).mean((0, 2, 3))
    return (mean * (mean * len(mean)).clamp_min(1e-30).log()).sum()


class Dvae(nn.Module):
    """Picture <-> grid of codes.

    `straight_through`: in training the decoder sees the hardest code, with the mixture's gradient. The paper's does
    not: the relaxation is used both ways.
    """

    def __init__(self, config: DvaeConfig):
        super().__init__()
        self.config = config
        self.encoder = encoder(config)
        self.decoder = decoder(config) if config.decoder else None
        self.straight_through = False

    @property
    def image_size(self) -> int:
        """The side of the pictures in pixels."""
        return self.config.size

    @property
    def grid(self) -> int:
        """The side of the grid of codes."""
        return self.config.size // 2 ** (self.config.groups - 1)

    @property
    def vocab(self) -> int:
        """How many codes there are."""
        return self.config.vocab

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Blocks' activations are computed again in the backward pass."""
        for tower in (self.encoder, self.decoder):
            if tower is not None:
                tower.checkpointing = enable

    def logits(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of 0..1 -> logits of the codes (B, V, h, w)."""
        return self.encoder(map_pixels(image.to(self.encoder.blocks["input"].weight.dtype)))

    def encode(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of 0..1 -> the likeliest codes (B, h, w)."""
        return self.logits(image).argmax(1)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> pictures (B, 3, H, W) of 0..1. Raises SettingsError if there is no decoder."""
        # The first convolution of a one-hot grid is a row of its weights, picked.
        first = self._decoder().blocks["input"]
        mixture = F.one_hot(codes, self.vocab).movedim(-1, 1).to(first.weight.dtype)
        return unmap_pixels(torch.sigmoid(self.decoder(mixture)[:, :3]))

    def reconstruct(self, image: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of 0..1 -> what is left of them after encoding and decoding."""
        return self.decode(self.encode(image))

    def forward(
        self, image: Tensor, temperature: float = 1 / 16, kl_weight: float = 6.6, evenness: float = 0.0
    ) -> dict[str, Tensor]:
        """Pictures (B, 3, H, W) of 0..1 -> "loss": -ELB in nats per value of a picture, and its two parts,
        "reconstruction" and "kl" (before its weight).

        `evenness`: the weight of `unevenness` in the loss. The paper has none; where a short training would use few
        codes it makes them many, as wav2vec 2.0 does for the same relaxation (Baevski et al. 2020).

        Both are of the whole picture and divided by its values, 3 H W, so that the weight is, at eight pixels a code,
        kl_weight / 192 of the divergence per position (paper, appendix A.3).
        """
        logits = self.logits(image).float()  # (B, V, h, w)
        mixture = F.gumbel_softmax(logits, tau=temperature, hard=self.straight_through, dim=1)
        decoder = self._decoder()
        mean, log_scale = decoder(mixture.to(decoder.blocks["input"].weight.dtype)).float().chunk(2, 1)
        values = image[0].numel()
        reconstruction = logit_laplace(map_pixels(image.float()), mean, log_scale).sum((1, 2, 3)).mean() / values
        kl = kl_to_uniform(logits).mean() / values
        loss = reconstruction + kl_weight * kl
        if evenness:
            loss = loss + evenness * unevenness(logits)
        return {"loss": loss, "reconstruction": reconstruction, "kl": kl}

    def _decoder(self) -> Tower:
        if self.decoder is None:
            raise SettingsError("this dVAE has no decoder (FLAVA's twin of the encoder): it can only encode")
        return self.decoder
