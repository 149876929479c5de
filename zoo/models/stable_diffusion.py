"""Stable Diffusion: a text tower, a UNet that takes noise out of latents, and the VAE they are latents of (Rombach et
al. 2022; CompVis/stable-diffusion).

B samples, C latent channels, h w latents, H W pixels, T tokens, D width of the context.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from zoo.errors import SettingsError
from zoo.generation.noise_schedule import NoiseConfig, NoiseSchedule
from zoo.generation.samplers import SamplerConfig
from zoo.generation.text_to_image import Score, generate
from zoo.models.clip import TextConfig
from zoo.models.kl_vae import KlVae, KlVaeConfig, sample_moments
from zoo.models.latent_drawing import Drawing, Sketch, draw, sketch_of
from zoo.models.prompt_contexts import PromptReader
from zoo.models.text_encoder import TowerConfig, build_text, text_config
from zoo.models.unet import UNet, UNetConfig
from zoo.models.vq_latents import VqLatents, build_vae, vae_config
from zoo.models.vqgan import VqganConfig

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger("zoo.models")
OPENAI_TEXT = TextConfig(width=768, depth=12, heads=12)


@dataclass(frozen=True, kw_only=True)
class StableDiffusionConfig:
    """A whole Stable Diffusion; the defaults are version 1. `start`, `end` and `pad`: the ids around a prompt, in
    windows of `window` tokens.

    How it is trained: `caption_dropout`, the part of captions left out, without which guidance has nothing to go away
    from; `min_snr`, above which a signal-to-noise ratio counts no more (Hang et al. 2023; 0: all steps count alike, as
    published); `noise_offset`, how far the noise of a whole channel is moved, so that dark and bright pictures are
    learnt. What `generate` takes where nothing else is asked for: `guidance`, its `rescale`, `sampler` and `steps`.
    """

    text: TowerConfig = OPENAI_TEXT
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: KlVaeConfig | VqganConfig = field(default_factory=KlVaeConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    start: int = 49406
    end: int = 49407
    pad: int = 49407
    window: int = 77
    caption_dropout: float = 0.1
    min_snr: float = 0.0
    noise_offset: float = 0.0
    guidance: float = 7.5
    rescale: float = 0.0
    sampler: str = "pndm"
    steps: int = 50

    @classmethod
    def from_dict(cls, sizes: Mapping) -> StableDiffusionConfig:
        """The config that `dataclasses.asdict`, and so a config.json, says. Unknown names raise TypeError."""
        kinds: dict[str, Callable] = {
            "text": text_config,
            "unet": UNetConfig.from_dict,
            "vae": vae_config,
            "noise": NoiseConfig.from_dict,
        }
        return cls(**{name: kinds[name](value) if name in kinds else value for name, value in sizes.items()})


class StableDiffusion(nn.Module):
    """Draws pictures of captions. `text` and `vae` are trained before and stay as they are, unless their
    `requires_grad_` is set again; `tokenizer` is needed to generate only, and has `encode(text) -> ids`.

    Raises SettingsError when the parts do not fit each other.
    """

    def __init__(
        self,
        config: StableDiffusionConfig,
        text: nn.Module | None = None,
        unet: UNet | None = None,
        vae: KlVae | VqLatents | None = None,
        tokenizer: Any = None,
    ):
        super().__init__()
        self.config = config
        self.text = text or build_text(config.text)
        self.unet = unet or UNet(config.unet)
        self.vae = vae or build_vae(config.vae)
        self.tokenizer = tokenizer
        self.schedule = NoiseSchedule(config.noise)
        self.tile: int | None = None
        self.text.requires_grad_(False)
        self.vae.requires_grad_(False)
        self._check_parts()

    def _check_parts(self) -> None:
        reads, inputs, channels = self.unet.config.context, self.unet.config.channels, self.vae.channels
        if self.text.width != reads:
            raise SettingsError(
                f"this text tower gives contexts {self.text.width} wide and the UNet reads {reads}: it was trained "
                "with another; give that tower, or train a UNet for this one"
            )
        if self.unet.config.out != channels or inputs not in (channels, 2 * channels + 1):
            raise SettingsError(
                f"this VAE's latents have {channels} channels and the UNet takes {inputs} and gives "
                f"{self.unet.config.out}: it was trained with another; give that VAE"
            )

    @property
    def image_size(self) -> int:
        """The side in pixels of the pictures that it was trained on."""
        return self.unet.config.size * self.vae.factor

    @property
    def inpaints(self) -> bool:
        """Whether the UNet reads a mask and the latents of the masked picture."""
        return self.unet.config.channels > self.vae.channels

    @property
    def context_dropout(self) -> float:
        """The part of captions that training leaves out."""
        return self.config.caption_dropout

    def train(self, mode: bool = True) -> StableDiffusion:
        """Parts that are not trained stay in evaluation mode."""
        super().train(mode)
        for part in (self.text, self.vae):
            part.train(mode and _trained(part))
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Blocks' activations are computed again in the backward pass."""
        self.unet.set_grad_checkpointing(enable)
        self.text.checkpointing = enable

    # --- training ----------------------------------------------------------------------------------------------------
    def forward(
        self,
        image: Tensor | None = None,
        text: Tensor | None = None,
        moments: Tensor | None = None,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Pictures (B, 3, H, W) of 0..1 and the tokens (B, T) of their captions -> "loss", the squared error of what
        the noise schedule has the UNet predict, at a timestep drawn for each sample.

        What was computed before may be given in their place: `moments` (B, 2 C, h, w) of the VAE, of which latents are
        drawn anew each time, and `context` (B, T, D) of the text tower. `mask` (B, 1, H, W), 1 where to draw anew, for
        a UNet that inpaints, together with the pictures. `weight` (B,): of each sample in the mean. Raises
        SettingsError where something is missing.
        """
        if (image is None and moments is None) or (text is None and context is None):
            raise SettingsError("forward needs pictures or the VAE's moments, and tokens or the text tower's context")
        with torch.no_grad():
            moments = self.vae.moments(image) if moments is None else moments
            latents = self.scaled(sample_moments(moments, torch.randn_like(moments.chunk(2, 1)[0])).float())
            noise = torch.randn_like(latents)
            if self.config.noise_offset:
                offset = torch.randn(*latents.shape[:2], 1, 1, device=latents.device)
                noise = noise + self.config.noise_offset * offset
            timesteps = torch.randint(self.config.noise.steps, (len(latents),), device=latents.device)
            noised = self.schedule.add_noise(latents, noise, timesteps)
            if self.inpaints:
                noised = torch.cat([noised, *self._masked(image, mask, latents)], 1)
        context = self._context(text, context)
        found = self.unet(noised.to(context.dtype), timesteps, context).float()
        errors = (found - self.schedule.target(latents, noise, timesteps)).square().flatten(1).mean(1)  # (B,)
        if self.config.min_snr:
            errors = errors * self.schedule.min_snr_weight(timesteps, self.config.min_snr)
        if weight is not None:
            errors = errors * weight
        return {"loss": errors.mean()}

    def scaled(self, latents: Tensor) -> Tensor:
        """The VAE's latents -> the UNet's, of about unit spread."""
        return latents * self.vae.scale

    def _context(self, text: Tensor | None, context: Tensor | None) -> Tensor:
        """Tokens or contexts -> contexts (B, T, D), in training some of them those of no caption."""
        rows = len(text if context is None else context)
        device = self.unet.conv_in.weight.device
        dropped = torch.rand(rows, device=device) < (self.config.caption_dropout if self.training else 0.0)
        with nullcontext() if _trained(self.text) else torch.no_grad():
            if context is None:
                return self.text(torch.where(dropped[:, None], self.empty(text.shape[1], device), text))
            nothing = self.text(self.empty(context.shape[1], device))
        return torch.where(dropped[:, None, None], nothing, context.to(nothing.dtype))  # a cache may be in fp16

    def empty(self, length: int, device: torch.device | str = "cpu") -> Tensor:
        """The tokens of no caption, (1, length)."""
        ids = [self.config.start, self.config.end] + [self.config.pad] * (length - 2)
        return torch.tensor([ids], device=device)

    def _masked(self, image: Tensor | None, mask: Tensor | None, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What a UNet that inpaints reads beside the noised latents: the mask and the latents of what it leaves."""
        if image is None or mask is None:
            raise SettingsError(
                "this UNet inpaints: to train it, forward needs pictures and a mask (B, 1, H, W) of each"
            )
        left = torch.where(mask > 0.5, 0.5, image)  # 0 in the network's -1..1, as published
        small = nn.functional.interpolate(mask.float(), latents.shape[-2:])
        moments = self.vae.moments(left)
        hidden = sample_moments(moments, torch.randn_like(moments.chunk(2, 1)[0])).float()
        return small, self.scaled(hidden)

    # --- drawing -----------------------------------------------------------------------------------------------------
    def generate(
        self,
        prompts: str | Sequence[str],
        n: int = 1,
        seed: int = 0,
        *,
        negative: str = "",
        guidance: float | None = None,
        rescale: float | None = None,
        sampler: str | SamplerConfig | None = None,
        steps: int | None = None,
        size: tuple[int, int] | None = None,
        image: Image.Image | Tensor | None = None,
        mask: Image.Image | Tensor | None = None,
        strength: float = 0.8,
        skip: int = 0,
        rerank: Score | None = None,
        candidates: int | None = None,
        preview: Callable[[int, Tensor], None] | None = None,
        check: Callable[[Tensor], Tensor] | None = None,
        batch_size: int | None = None,
        progress: bool = True,
    ) -> list[list[Image.Image]]:
        """For each prompt a list of `n` pictures; "" is a picture of anything.

        Prompts may be longer than a window, and (words:1.3) weigh more, see `zoo.generation.prompts`; `negative`: what
        to go away from. `guidance`: how far, 1 is not at all; `rescale`: how much of the spread that it adds is taken
        back, 0 to 1 (Lin et al. 2023). `sampler`: a name of `zoo.generation.samplers`, or all about it; `steps`.
        `size`: width and height in pixels. `skip`: so many of the text tower's last blocks are left out.

        `image`, of that size, to begin with, noised by `strength`: 0 gives it back, 1 leaves nothing of it. `mask`: 1,
        or white, where to draw anew. `preview(step, pictures so far (B, 3, H, W))` is told after each step.
        `check(pictures (B, 3, H, W))` -> whether each should not be shown, (B,), which is then black; it is asked only
        if it is given, see `zoo.models.safety_checker`. `seed`, `candidates`, `rerank`, `batch_size`: see
        `zoo.generation.text_to_image.generate`. Raises SettingsError.
        """
        drawing = Drawing(
            sampler=self._sampler(sampler, steps),
            guidance=self.config.guidance if guidance is None else guidance,
            rescale=self.config.rescale if rescale is None else rescale,
            preview=preview,
            progress=progress,
        )
        sketch = sketch_of(self, size, image, mask, strength)
        reader = PromptReader(self, skip)

        def pictures(texts: list[str], seeds: list[int]) -> Tensor:
            drawn = self.draw(texts, seeds, negative, drawing, sketch, reader)
            return drawn if check is None else hidden(drawn, check(drawn))

        words = {"candidates": candidates, "rerank": rerank, "batch_size": batch_size, "progress": progress}
        with torch.inference_mode():
            return generate(pictures, prompts, n, seed, **words)

    def draw(
        self, texts: list[str], seeds: list[int], negative: str, drawing: Drawing, sketch: Sketch, reader: PromptReader
    ) -> Tensor:
        """Texts and a seed each -> pictures (B, 3, H, W) of 0..1. A picture does not depend on what is drawn with it:
        prompts of equally many windows are drawn together."""
        drawn: dict[int, Tensor] = {}
        for rows, contexts, without in reader.groups(texts, negative if drawing.guidance != 1 else None):
            found = draw(self, contexts, without, [seeds[row] for row in rows], drawing, sketch)
            drawn |= dict(zip(rows, found, strict=True))
        return torch.stack([drawn[row] for row in range(len(texts))])

    def _sampler(self, sampler: str | SamplerConfig | None, steps: int | None) -> SamplerConfig:
        if isinstance(sampler, SamplerConfig):
            if steps not in (None, sampler.steps):
                raise SettingsError(f"steps={steps}, and the SamplerConfig says {sampler.steps}: say it once")
            return sampler
        return SamplerConfig(
            sampler=sampler or self.config.sampler, steps=self.config.steps if steps is None else steps
        )


def hidden(pictures: Tensor, hide: Tensor) -> Tensor:
    """Pictures (B, 3, H, W), and whether each should not be shown -> the same, those black. The log says how many."""
    if hide.any():
        logger.warning("%d of %d pictures are black: check= found that they should not be shown", hide.sum(), len(hide))
    return pictures.masked_fill(hide.to(pictures.device)[:, None, None, None], 0.0)


def _trained(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())
