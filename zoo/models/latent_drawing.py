"""Drawing with a Stable Diffusion: from noise, from a picture, or inside a mask.

B pictures, C latent channels, h w latents, H W pixels. What is drawn at random for a picture comes from its own seed on
the CPU, in the order in which diffusers' pipelines ask for it, so that the same seeds give the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from zoo.blocks.packed import packed
from zoo.errors import SettingsError
from zoo.generation.guidance import guided
from zoo.generation.samplers import SamplerConfig, noised, sample, strength_start, timesteps
from zoo.models.kl_vae import sample_moments

if TYPE_CHECKING:
    from zoo.models.stable_diffusion import StableDiffusion

OVERLAP = 0.25  # of neighbouring tiles


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How: see `StableDiffusion.generate`."""

    sampler: SamplerConfig
    guidance: float = 7.5
    rescale: float = 0.0
    preview: Callable[[int, Tensor], None] | None = None
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """What to begin with: the size (height, width) in pixels, a picture (1, 3, H, W) of 0..1, and a mask (1, 1, H, W),
    1 where to draw anew."""

    size: tuple[int, int]
    image: Tensor | None = None
    mask: Tensor | None = None
    strength: float = 1.0


# --- checks ----------------------------------------------------------------------------------------------------------
def sketch_of(
    model: StableDiffusion,
    size: tuple[int, int] | None,
    image: Image.Image | Tensor | None,
    mask: Image.Image | Tensor | None,
    strength: float,
) -> Sketch:
    """What was given, as tensors. Raises SettingsError for what does not go together."""
    picture = None if image is None else _picture(image)
    area = None if mask is None else _mask(mask)
    found = tuple(picture.shape[-2:]) if picture is not None else None
    wanted = (size[1], size[0]) if size else found or (model.image_size,) * 2
    factor = model.vae.factor
    if any(side < 1 or side % factor for side in wanted):
        fits = " x ".join(str(max(1, round(side / factor)) * factor) for side in wanted[::-1])
        raise SettingsError(
            f"a size of {wanted[1]} x {wanted[0]} pixels: sides must be multiples of {factor}; {fits} is nearest"
        )
    for what, shape in (("image", found), ("mask", None if area is None else tuple(area.shape[-2:]))):
        if shape not in (None, wanted):
            raise SettingsError(
                f"the {what} has {shape[1]} x {shape[0]} pixels, and {wanted[1]} x {wanted[0]} are to be drawn: resize"
            )
    if mask is not None and image is None:
        raise SettingsError("a mask says where to draw anew in an image: give image= too")
    if model.inpaints and (image is None or mask is None):
        raise SettingsError("this model inpaints: give image= and mask=")
    if image is not None and not 0 <= strength <= 1:
        raise SettingsError(f"strength={strength}: give 0, which leaves the image as it is, to 1, which leaves nothing")
    return Sketch(size=wanted, image=picture, mask=area, strength=strength if image is not None else 1.0)


def _picture(image: Image.Image | Tensor) -> Tensor:
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None] / 255
    if image.ndim != 3 or image.shape[0] != 3:
        raise SettingsError(f"image: a PIL picture or (3, H, W) of 0..1 is needed, this is {tuple(image.shape)}")
    return image[None].float()


def _mask(mask: Image.Image | Tensor) -> Tensor:
    if isinstance(mask, Image.Image):
        mask = torch.from_numpy(np.array(mask.convert("L"))) / 255
    if mask.ndim not in (2, 3) or mask.shape[:-2].numel() != 1:
        raise SettingsError(f"mask: a PIL picture or (H, W) of 0..1 is needed, this is {tuple(mask.shape)}")
    return (mask.float() >= 0.5).float().reshape(1, 1, *mask.shape[-2:])


# --- drawing ---------------------------------------------------------------------------------------------------------
class Numbers:
    """Standard normal numbers for each picture, from a generator of its own."""

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device, self.dtype = shape, device, dtype

    def __call__(self) -> Tensor:
        """(B, C, h, w)."""
        rows = [torch.randn(self.shape, generator=g, dtype=self.dtype) for g in self.generators]
        return torch.stack(rows).to(self.device)


def draw(
    model: StableDiffusion,
    contexts: Tensor,
    without: Tensor | None,
    seeds: Sequence[int],
    how: Drawing,
    sketch: Sketch,
) -> Tensor:
    """Contexts (B, T, D), those of the negative prompt unless guidance is 1, and a seed each -> pictures (B, 3, H, W)
    of 0..1."""
    weight = model.unet.conv_in.weight
    height, width = (side // model.vae.factor for side in sketch.size)
    numbers = Numbers(seeds, (model.vae.channels, height, width), weight.device, weight.dtype)
    start = strength_start(how.sampler, sketch.strength) if sketch.image is not None else 0
    count = len(timesteps(model.schedule, how.sampler))
    if sketch.image is not None and start >= count:
        if sketch.mask is None or not model.inpaints:
            return sketch.image.to(weight.device).expand(len(seeds), -1, -1, -1)
        raise SettingsError(f"strength={sketch.strength} leaves no step of {count}: give more")
    known = model.unet.keys_values((contexts if without is None else torch.cat([without, contexts])).to(weight.dtype))

    clean: list[Tensor] = []  # what the last step makes of the picture, to be shown

    def predict(latents: Tensor, timestep: Tensor) -> Tensor:
        x = latents.to(weight.dtype)
        x = x if begin.beside is None else torch.cat([x, begin.beside], 1)
        if without is None:
            found = model.unet(x, timestep, known)
        else:
            nothing, something = model.unet(torch.cat([x, x]), timestep, known).chunk(2)
            found = guided(nothing, something, how.guidance, how.rescale)
        if how.preview is not None:
            clean[:] = [model.schedule.x0(found, latents, timestep.round().long())]
        return found

    def on_step(number: int, timestep: Tensor, latents: Tensor) -> Tensor:
        if how.preview is not None:
            how.preview(number + 1, decode(model, clean[0]))
        return begin.keep(number, latents)

    words = {"noise": numbers, "start": start, "on_step": on_step, "progress": how.progress}
    with packed(model.unet), packed(model.vae):
        begin = _Beginning(model, sketch, numbers, start, how.sampler)
        return decode(model, sample(predict, begin.latents, model.schedule, how.sampler, **words))


class _Beginning:
    """What drawing starts from, what the UNet reads beside it, and what is put back after each step."""

    def __init__(
        self, model: StableDiffusion, sketch: Sketch, numbers: Numbers, start: int, sampler: SamplerConfig
    ) -> None:
        self.schedule, self.sampler = model.schedule, sampler
        self.beside: Tensor | None = None
        self.clean = self.small = None
        weight = model.unet.conv_in.weight
        image = None if sketch.image is None else sketch.image.to(weight.device)
        mask = None if sketch.mask is None else sketch.mask.to(weight.device, weight.dtype)
        if image is not None and (start or (mask is not None and not model.inpaints) or mask is None):
            self.clean = _latents(model, image, numbers)
        self.noise = numbers()
        # A picture that is drawn over at full strength leaves nothing where a mask is given, and its traces elsewhere.
        fresh = self.clean is None or (mask is not None and sketch.strength == 1)
        self.latents = self.noise if fresh else noised(self.clean, self.noise, self.schedule, sampler, start)
        if mask is None:
            self.clean = None
            return
        small = F.interpolate(mask, self.noise.shape[-2:])
        left = torch.where(mask > 0.5, 0.5, image)  # 0 in the network's -1..1
        if model.inpaints:
            hidden = _latents(model, left, numbers)
            self.beside, self.clean = torch.cat([small.expand(len(hidden), -1, -1, -1), hidden], 1), None
        else:
            numbers()  # diffusers draws the latents of the masked picture here too, and leaves them
            self.small = small

    def keep(self, number: int, latents: Tensor) -> Tensor:
        """Latents after step `number`, outside the mask those of the picture, as noisy as the next step expects it."""
        if self.clean is None:
            return latents
        clean = noised(self.clean, self.noise, self.schedule, self.sampler, number + 1)
        return (1 - self.small) * clean + self.small * latents


def _latents(model: StableDiffusion, image: Tensor, numbers: Numbers) -> Tensor:
    """A picture (1, 3, H, W) -> its latents for the UNet, drawn for each seed."""
    moments = model.vae.moments(image).to(numbers.dtype)
    noise = numbers()
    return model.scaled(sample_moments(moments.expand(len(noise), -1, -1, -1), noise))


# --- pictures out of latents -----------------------------------------------------------------------------------------
def decode(model: StableDiffusion, latents: Tensor) -> Tensor:
    """The UNet's latents (B, C, h, w) -> pictures (B, 3, H, W) of 0..1, one at a time, and in tiles of `model.tile`
    pixels where that is set. Raises SettingsError for latents that are no numbers."""
    latents = latents / model.vae.scale
    if not latents.isfinite().all():
        raise _not_a_number(model, "the UNet")
    pictures = torch.cat([_decode(model, row) for row in latents.split(1)])
    if not pictures.isfinite().all():
        raise _not_a_number(model, "the VAE")
    return pictures


def _not_a_number(model: StableDiffusion, part: str) -> SettingsError:
    kind = str(model.unet.conv_in.weight.dtype).removeprefix("torch.")
    return SettingsError(
        f"{part} gave values that are no numbers, in {kind}: load the model with dtype='bf16' or 'fp32', and give a "
        "Stable Diffusion 2.1 upcast=True in its UNet's config"
    )


def _decode(model: StableDiffusion, latents: Tensor) -> Tensor:
    if model.tile is None or max(latents.shape[-2:]) * model.vae.factor <= model.tile:
        return model.vae.decode(latents)
    factor = model.vae.factor
    side = max(1, model.tile // factor)
    step = max(1, round(side * (1 - OVERLAP)))
    height, width = latents.shape[-2:]
    rows = [
        [model.vae.decode(latents[:, :, y : y + side, x : x + side]) for x in range(0, width, step)]
        for y in range(0, height, step)
    ]
    overlap, kept = (side - step) * factor, step * factor
    lines = []
    for y, row in enumerate(rows):
        line = []
        for x, tile in enumerate(row):
            tile = _faded(rows[y - 1][x], tile, overlap, 2) if y else tile
            tile = _faded(row[x - 1], tile, overlap, 3) if x else tile
            row[x] = tile
            line.append(tile[:, :, :kept, :kept])
        lines.append(torch.cat(line, 3))
    return torch.cat(lines, 2)


def _faded(before: Tensor, tile: Tensor, overlap: int, dim: int) -> Tensor:
    """`tile` with its first pixels along `dim` faded in from the last ones of the tile before."""
    overlap = min(overlap, before.shape[dim], tile.shape[dim])
    share = torch.arange(overlap, device=tile.device, dtype=tile.dtype) / overlap
    share = share[:, None] if dim == 2 else share
    start, rest = tile.split([overlap, tile.shape[dim] - overlap], dim)
    end = before.narrow(dim, before.shape[dim] - overlap, overlap)
    return torch.cat([end * (1 - share) + start * share, rest], dim)
