"""PIL pictures -> tensors, as the published models expect them.

Facts from openai/CLIP (`clip.py`, `_transform`) and torchvision (`Resize`, `CenterCrop`, `ToTensor`, `Normalize`,
`RandomResizedCrop`) over Pillow. Two of the published ways surprise: RGB comes after the resizing, so Pillow resizes a
palette picture to the nearest colour and RGBA with its alpha; and EXIF orientation is ignored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from zoo.errors import BadImage, SettingsError, nearest

Color = tuple[float, float, float]
Size = tuple[int, int]  # width, height
Box = tuple[float, float, float, float]  # left, upper, right, lower

CLIP_MEAN: Color = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Color = (0.26862954, 0.26130258, 0.27577711)
INTERPOLATIONS = {name.lower(): Image.Resampling[name] for name in ("NEAREST", "BILINEAR", "BICUBIC", "LANCZOS")}
_SLENDER = 200  # at this ratio of edges the enlarged picture that is cropped takes 40 MB at 224 x 224
_GAP = 3.0  # fast: shrink cheaply to three times the size that is wanted or more, and only then interpolate


def clip_transform(
    img_size: int,
    mean: Color = CLIP_MEAN,
    std: Color = CLIP_STD,
    *,
    resize: str = "shortest",
    interpolation: str = "bicubic",
    fast: bool = False,
) -> ClipTransform:
    """The preprocessing of the published models: PIL picture -> float32 (3, img_size, img_size), see ClipTransform.

    resize: "shortest" scales the shorter edge to img_size and crops the centre (CLIP); "squash" scales both edges
    (Chinese-CLIP). mean = std = (0.5, 0.5, 0.5) gives pixels in [-1, 1].
    Raises SettingsError for settings that do not exist; the transform raises BadImage.
    """
    return ClipTransform(
        img_size=img_size, mean=tuple(mean), std=tuple(std), resize=resize, interpolation=interpolation, fast=fast
    )


def clip_train_transform(
    img_size: int,
    mean: Color = CLIP_MEAN,
    std: Color = CLIP_STD,
    *,
    scale: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.0,
    interpolation: str = "bicubic",
    fast: bool = False,
) -> ClipTrainTransform:
    """The augmentation of open_clip's training: PIL picture -> float32 (3, img_size, img_size), see ClipTrainTransform.

    scale: what part of the area a crop covers; ratio: width to height of a crop, drawn on a logarithmic scale;
    flip: how likely a picture is mirrored, 0 as published, since captions say "left" and pictures hold letters.
    """
    return ClipTrainTransform(
        img_size=img_size, mean=tuple(mean), std=tuple(std), scale=tuple(scale), ratio=tuple(ratio), flip=flip,
        interpolation=interpolation, fast=fast,
    )  # fmt: skip


def unit_transform(img_size: int) -> UnitTransform:
    """The preprocessing of OpenAI's dVAE: PIL picture -> float32 (3, img_size, img_size) of 0..1, see UnitTransform."""
    return UnitTransform(img_size=img_size)


@dataclass(frozen=True, kw_only=True)
class ClipTransform:
    """PIL picture -> float32 (3, img_size, img_size), bit for bit the published preprocessing.

    fast: a large JPEG that is not decoded yet is decoded at a half, quarter or eighth of its size (which changes its
    `size`), any picture of six times img_size or more is averaged down before it is interpolated, and only what the
    crop keeps is computed. The result is within 1 level of 255 on average and within 32 at hard coloured edges
    (photographs: 0.3 and 16).

    Raises BadImage for a picture that cannot be decoded, has no pixels, or (resize "shortest") has edges of more than
    200 to 1.
    """

    img_size: int
    mean: Color
    std: Color
    resize: str
    interpolation: str
    fast: bool

    def __post_init__(self) -> None:
        _check_settings(self.img_size, self.interpolation)
        if self.resize not in ("shortest", "squash"):
            raise SettingsError(f"resize is 'shortest' or 'squash', not {self.resize!r}")

    def __call__(self, picture: Image.Image) -> Tensor:
        _check_pixels(picture)
        n, filter = self.img_size, INTERPOLATIONS[self.interpolation]
        size = _shortest_to(n, picture) if self.resize == "shortest" else (n, n)
        left, upper = (int(round((edge - n) / 2)) for edge in size)
        crop = (left, upper, left + n, upper + n)
        if self.fast:
            scale = picture.width / size[0], picture.height / size[1]
            box = tuple(edge * scale[i % 2] for i, edge in enumerate(crop))
            return _to_tensor(_resize_fast(picture, (n, n), box, filter), self.mean, self.std)
        return _to_tensor(_decode(picture).resize(size, filter).crop(crop), self.mean, self.std)


@dataclass(frozen=True, kw_only=True)
class UnitTransform:
    """PIL picture -> float32 (3, img_size, img_size) of 0..1: the shorter edge scaled to img_size by Lanczos, and the
    centre cropped, as in openai/DALL-E's notebooks/usage.ipynb.

    Colours become RGB first, as in training (`zoo.data.dvae_train_transform`), and a picture that is smaller is
    enlarged where the notebook refuses it. Raises BadImage as ClipTransform does.
    """

    img_size: int

    def __post_init__(self) -> None:
        _check_settings(self.img_size, "lanczos")

    def __call__(self, picture: Image.Image) -> Tensor:
        _check_pixels(picture)
        n = self.img_size
        _shortest_to(n, picture)  # refuses what is too slender
        ratio = n / min(picture.size)
        size = tuple(round(ratio * edge) for edge in picture.size)  # where torchvision cuts off, the notebook rounds
        left, upper = (int(round((edge - n) / 2)) for edge in size)
        picture = _decode(picture).convert("RGB").resize(size, Image.Resampling.LANCZOS)
        return _to_tensor(picture.crop((left, upper, left + n, upper + n)), (0.0,) * 3, (1.0,) * 3)


@dataclass(frozen=True, kw_only=True)
class ClipTrainTransform:
    """PIL picture -> float32 (3, img_size, img_size): a random crop, resized, and mirrored now and then.

    Chance is drawn from torch's generator alone, so a run that restores it sees the same crops again.
    fast: as in ClipTransform. Raises BadImage for a picture that cannot be decoded or has no pixels.
    """

    img_size: int
    mean: Color
    std: Color
    scale: tuple[float, float]
    ratio: tuple[float, float]
    flip: float
    interpolation: str
    fast: bool

    def __post_init__(self) -> None:
        _check_settings(self.img_size, self.interpolation)
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise SettingsError(f"scale is a range within (0, 1], not {self.scale}")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise SettingsError(f"ratio is a range of positive numbers, not {self.ratio}")
        if not 0 <= self.flip <= 1:
            raise SettingsError(f"flip is a probability, not {self.flip}")

    def __call__(self, picture: Image.Image) -> Tensor:
        _check_pixels(picture)
        size, filter = (self.img_size, self.img_size), INTERPOLATIONS[self.interpolation]
        crop = self._draw_crop(*picture.size)
        if self.fast:
            picture = _resize_fast(picture, size, crop, filter)
        else:
            picture = _decode(picture).crop(crop).resize(size, filter)
        if torch.rand(()) < self.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _to_tensor(picture, self.mean, self.std)

    def _draw_crop(self, width: int, height: int) -> Box:
        """A random crop within the picture; after ten that do not fit, the largest central one of an allowed ratio."""
        for _ in range(10):
            area = width * height * _uniform(*self.scale)
            ratio = math.exp(_uniform(math.log(self.ratio[0]), math.log(self.ratio[1])))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left = int(torch.randint(width - w + 1, ()))
                upper = int(torch.randint(height - h + 1, ()))
                return left, upper, left + w, upper + h
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
        left, upper = (width - w) // 2, (height - h) // 2
        return left, upper, left + w, upper + h


def to_pictures(images: Tensor, mean: Color = CLIP_MEAN, std: Color = CLIP_STD) -> list[Image.Image]:
    """Normalised images (B, 3, H, W) -> RGB pictures: the inverse of the transforms, for previews."""
    mean, std = (torch.tensor(color, device=images.device).view(3, 1, 1) for color in (mean, std))
    pixels = (images.detach().float() * std + mean).mul(255).round().clamp(0, 255)
    return [Image.fromarray(image) for image in pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()]


def _check_settings(img_size: int, interpolation: str) -> None:
    if img_size < 1:
        raise SettingsError(f"img_size is a number of pixels, not {img_size}")
    if interpolation not in INTERPOLATIONS:
        raise SettingsError(f"no interpolation {interpolation!r}; {nearest(interpolation, INTERPOLATIONS)}")


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _check_pixels(picture: Image.Image) -> None:
    if not all(picture.size):
        raise BadImage(f"{_name(picture)} of {picture.width} x {picture.height} has no pixels; leave it out")


def _shortest_to(n: int, picture: Image.Image) -> Size:
    """The size of the picture when its shorter edge is n."""
    short, long = sorted(picture.size)
    if long > _SLENDER * short:
        raise BadImage(f"{_name(picture)} of {picture.width} x {picture.height} is too slender to crop; leave it out")
    long = int(n * long / short)
    return (n, long) if picture.width <= picture.height else (long, n)


def _decode(picture: Image.Image) -> Image.Image:
    try:
        picture.load()
    except MemoryError:
        raise  # this machine is at its limit; the picture may be fine
    except Exception as error:  # on damaged bytes Pillow's decoders raise whatever their parsing ran into
        raise BadImage(f"{_name(picture)} cannot be decoded ({error}); replace it or leave it out") from error
    return picture


def _resize_fast(picture: Image.Image, size: Size, box: Box, filter: Image.Resampling) -> Image.Image:
    """What the box holds, resized, by way of a decoder that shrinks (JPEG) and of averages (all)."""
    full = picture.size
    boxed = box[2] - box[0], box[3] - box[1]
    wanted = tuple(math.ceil(_GAP * s * f / b) for s, f, b in zip(size, full, boxed, strict=True))
    drafted = picture.draft(None, wanted)
    picture = _decode(picture)
    shrunk = drafted[1][2:] if drafted else full  # not whole numbers where the shrunk edge was rounded up
    box = tuple(min(edge * shrunk[i % 2] / full[i % 2], picture.size[i % 2]) for i, edge in enumerate(box))
    return picture.resize(size, filter, box, reducing_gap=_GAP)


def _to_tensor(picture: Image.Image, mean: Color, std: Color) -> Tensor:
    """RGB picture -> (3, H, W), by torchvision's operations in torchvision's order: the last bits depend on it."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))  # (H, W, 3)
    image = pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean, std = (torch.tensor(color, dtype=torch.float32).view(3, 1, 1) for color in (mean, std))
    return image.sub_(mean).div_(std)


def _name(picture: Image.Image) -> str:
    return getattr(picture, "filename", "") or "the picture"
