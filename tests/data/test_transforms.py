"""The exact transforms are the published ones to the last bit; the fast ones keep their promise; chance is torch's."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from zoo.data.transforms import CLIP_MEAN, CLIP_STD, clip_train_transform, clip_transform, to_pictures, unit_transform
from zoo.errors import BadImage, SettingsError

LEVELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}  # a tensor of the 0..255 that went in


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze()


def scene(width: int, height: int) -> Image.Image:
    """Smooth colours with hard-edged shapes in them: easier than noise, harder than a photograph."""
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(x / width * a + y / height * b) for a, b in ((9, 4), (3, 11), (7, 7))]
    picture = Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8))
    draw, rng = ImageDraw.Draw(picture), np.random.default_rng(1)
    for _ in range(60):
        left, upper = int(rng.integers(width)), int(rng.integers(height))
        color = tuple(int(c) for c in rng.choice([0, 255], 3))
        draw.rectangle((left, upper, left + int(rng.integers(width // 6)), upper + int(rng.integers(9))), fill=color)
    return picture


def jpeg(picture: Image.Image) -> Image.Image:
    """The picture as a file holds it: opened and not yet decoded."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return Image.open(file)


def published(picture: Image.Image, n: int) -> np.ndarray:
    """OpenAI's preprocessing, written in Pillow and numpy alone: float32 (3, n, n)."""
    width, height = picture.size
    new = (n, int(n * height / width)) if width <= height else (int(n * width / height), n)
    picture = picture if picture.size == new else picture.resize(new, Image.Resampling.BICUBIC)
    left, upper = int(round((new[0] - n) / 2.0)), int(round((new[1] - n) / 2.0))
    picture = picture.crop((left, upper, left + n, upper + n)).convert("RGB")
    levels = np.asarray(picture).astype(np.float32).transpose(2, 0, 1) / np.float32(255)
    mean, std = (np.array(color, dtype=np.float32).reshape(3, 1, 1) for color in (CLIP_MEAN, CLIP_STD))
    return (levels - mean) / std


def is_published(picture: Image.Image, n: int) -> bool:
    image = clip_transform(n)(picture.copy())
    assert image.shape == (3, n, n) and image.dtype == torch.float32 and image.is_contiguous()
    return np.array_equal(image.numpy(), published(picture, n))


# --- the published preprocessing -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "size", [(64, 64), (100, 37), (37, 100), (32, 32), (32, 57), (61, 32), (5, 3), (33, 200), (500, 375), (1, 1)]
)
def test_every_size_of_picture_gives_the_published_bits(size):
    assert is_published(Image.fromarray(noise(*size).reshape(size[1], size[0], 3)), 32)


def test_at_224_the_bits_are_the_published_ones():
    assert is_published(scene(640, 427), 224)


def in_mode(mode: str) -> Image.Image:
    rgba = Image.fromarray(noise(70, 50, 4))
    if mode == "I;16":
        return Image.fromarray(np.random.default_rng(0).integers(0, 65536, (50, 70)).astype(np.uint16))
    if mode == "P":
        return rgba.convert("RGB").quantize(16)
    if mode == "P with transparency":
        picture = rgba.convert("RGB").quantize(16)
        picture.info["transparency"] = 3
        return picture
    return rgba.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr", "1", "HSV", "LAB") else rgba.convert(mode)


@pytest.mark.parametrize(
    "mode",
    ["RGB", "RGBA", "L", "LA", "1", "P", "P with transparency", "I;16", "I", "F", "CMYK", "YCbCr", "HSV", "LAB"],
)
def test_every_mode_gives_the_published_bits(mode):
    assert is_published(in_mode(mode), 24)


@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_colour_becomes_rgb_after_resizing_and_not_before(mode):
    before = published(in_mode(mode).convert("RGB"), 24)
    assert not np.array_equal(clip_transform(24)(in_mode(mode)).numpy(), before)


def test_a_palette_picture_gets_no_new_colours():
    picture = in_mode("P")
    known = set(map(tuple, np.asarray(picture.convert("RGB")).reshape(-1, 3).tolist()))
    image = clip_transform(24, **LEVELS)(picture).round().int()
    assert set(map(tuple, image.permute(1, 2, 0).reshape(-1, 3).tolist())) <= known


@pytest.mark.parametrize("long, first", [(7, 2), (5, 0), (6, 1), (9, 2), (11, 4)])
def test_the_crop_begins_at_half_the_rest_rounded_to_even(long, first):
    # The picture is 4 wide already, so rows come through as they are; each row has its own level.
    rows = np.repeat(np.arange(long, dtype=np.uint8)[:, None, None], 4, axis=1).repeat(3, axis=2)
    image = clip_transform(4, **LEVELS)(Image.fromarray(rows))
    assert image[0, :, 0].round().tolist() == [first, first + 1, first + 2, first + 3]


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright
    plain, turned = io.BytesIO(), io.BytesIO()
    scene(80, 60).save(plain, "JPEG")
    scene(80, 60).save(turned, "JPEG", exif=exif)
    assert clip_transform(32)(Image.open(turned)).equal(clip_transform(32)(Image.open(plain)))


def test_the_picture_of_the_caller_stays_as_it_was():
    picture = scene(60, 40)
    before = picture.tobytes()
    clip_transform(32)(picture)
    clip_transform(60)(picture)
    assert picture.size == (60, 40) and picture.tobytes() == before


def test_squash_resizes_both_edges_and_crops_nothing():
    picture = scene(90, 40)
    image = clip_transform(24, resize="squash", **LEVELS)(picture)
    expected = np.asarray(picture.resize((24, 24), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.array_equal(image.round().numpy(), expected)


def test_interpolation_is_the_one_asked_for():
    picture = scene(90, 60)
    image = clip_transform(24, resize="squash", interpolation="bilinear", **LEVELS)(picture)
    expected = np.asarray(picture.resize((24, 24), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.array_equal(image.round().numpy(), expected)


def test_half_and_half_gives_pixels_between_minus_one_and_one():
    image = clip_transform(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))(Image.fromarray(np.eye(8, dtype=np.uint8) * 255))
    assert sorted(image.unique().tolist()) == [-1, 1]


# --- pictures that cannot be used ------------------------------------------------------------------------------------
def cut_short() -> Image.Image:
    file = io.BytesIO()
    scene(200, 200).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()[:2000]))


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("make", [clip_transform, clip_train_transform])
def test_a_picture_that_cannot_be_decoded_is_a_bad_image(make, fast):
    with pytest.raises(BadImage, match="cannot be decoded"):
        make(32, fast=fast)(cut_short())


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("make", [clip_transform, clip_train_transform])
@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_a_picture_without_pixels_is_a_bad_image(make, size, fast):
    with pytest.raises(BadImage, match="no pixels"):
        make(32, fast=fast)(Image.new("RGB", size))


def test_a_slender_picture_is_refused_before_it_fills_the_memory():
    with pytest.raises(BadImage, match="slender"):
        clip_transform(224)(Image.new("RGB", (1, 60_000)))
    assert clip_transform(32)(Image.new("RGB", (1, 200))).shape == (3, 32, 32)


# --- fast ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("size", [(900, 620), (620, 901), (100, 75), (75, 100), (20, 30)])
@pytest.mark.parametrize("decoded", [False, True])
def test_fast_is_within_its_tolerance(resize, size, decoded):
    exact, fast = (clip_transform(64, resize=resize, fast=fast, **LEVELS) for fast in (False, True))
    file = jpeg(scene(*size))
    expected = exact(file.copy())
    picture = file.copy() if decoded else jpeg(scene(*size))
    apart = (fast(picture) - expected).abs()
    assert apart.mean() < 1 and apart.max() < 32


@pytest.mark.parametrize("mode", ["RGBA", "L", "1", "P", "I;16", "CMYK", "F"])
def test_fast_takes_every_mode(mode):
    picture = in_mode(mode)
    exact, fast = (clip_transform(24, fast=fast, **LEVELS)(picture) for fast in (False, True))
    assert (exact - fast).abs().mean() < 2


@pytest.mark.parametrize("make", [clip_transform, clip_train_transform])
def test_fast_decodes_a_large_jpeg_at_a_fraction_of_its_size(make):
    file = jpeg(scene(1200, 900))
    make(32, fast=True)(file)
    assert file.size == (150, 113)


# --- training --------------------------------------------------------------------------------------------------------
def test_the_same_seed_draws_the_same_crops_and_another_others():
    transform, picture = clip_train_transform(24, scale=(0.3, 1.0), flip=0.5), scene(90, 60)

    def draw(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.stack([transform(picture) for _ in range(4)])

    first = draw(0)
    np.random.seed(1)  # noqa: NPY002  another source of chance must not matter
    assert draw(0).equal(first)
    assert not draw(1).equal(first)
    assert not first[0].equal(first[1])


def crops_seen(size: tuple[int, int], count: int = 60, **settings) -> np.ndarray:
    """Left, upper, right, lower edges (count, 4) of what the crops show, in parts of the picture."""
    x, y = np.meshgrid(np.linspace(0, 250, size[0]), np.linspace(0, 250, size[1]))
    picture = Image.fromarray(np.stack([x, y, x], axis=-1).round().astype(np.uint8))
    transform = clip_train_transform(16, interpolation="nearest", **LEVELS, **settings)
    images = [transform(picture) / 250 for _ in range(count)]
    return np.array([[float(i[0].min()), float(i[1].min()), float(i[0].max()), float(i[1].max())] for i in images])


def test_crops_cover_the_part_and_have_the_shape_that_was_asked_for():
    torch.manual_seed(0)
    edges = crops_seen((400, 300), scale=(0.4, 0.6), ratio=(0.5, 2.0))
    width, height = edges[:, 2] - edges[:, 0], edges[:, 3] - edges[:, 1]
    assert 0.33 < (width * height).min() and (width * height).max() < 0.62  # the 16 samples miss the very edge
    shape = width * 400 / (height * 300)
    assert 0.48 < shape.min() < 0.75 and 1.4 < shape.max() < 2.1
    assert edges[:, 0].max() > 0.2 and edges[:, 2].min() < 0.8, "crops lie in different places"


def test_a_picture_that_no_crop_fits_gives_its_centre():
    torch.manual_seed(0)
    edges = crops_seen((1000, 20), count=3, scale=(0.9, 1.0))
    assert np.ptp(edges, axis=0).max() == 0
    assert edges[0, 0] + edges[0, 2] == pytest.approx(1, abs=0.02)
    assert edges[0, 2] - edges[0, 0] == pytest.approx(20 * 4 / 3 / 1000, abs=0.01)


def test_pictures_are_mirrored_as_often_as_asked_for():
    picture = Image.fromarray(np.tile(np.arange(0, 240, 10, dtype=np.uint8), (24, 1)))
    for flip, at_least, at_most in ((0.0, 0, 0), (0.5, 10, 30), (1.0, 40, 40)):
        transform = clip_train_transform(8, flip=flip)
        torch.manual_seed(0)
        mirrored = sum(bool(image[0, 0, 0] > image[0, 0, -1]) for image in (transform(picture) for _ in range(40)))
        assert at_least <= mirrored <= at_most


def test_a_crop_of_everything_is_the_squashed_picture():
    train = clip_train_transform(24, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    assert train(scene(60, 60)).equal(clip_transform(24, resize="squash")(scene(60, 60)))


def test_fast_training_sees_what_exact_training_sees():
    images = []
    for fast in (False, True):
        torch.manual_seed(5)
        images.append(clip_train_transform(32, scale=(0.5, 1.0), fast=fast, **LEVELS)(jpeg(scene(700, 500))))
    assert (images[0] - images[1]).abs().mean() < 3  # a crop resized with its surroundings differs at its rim


# --- all -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [clip_transform, clip_train_transform])
def test_transforms_survive_pickling(make):
    transform = pickle.loads(pickle.dumps(make(16)))
    assert transform == make(16) and transform(scene(20, 30)).shape == (3, 16, 16)


@pytest.mark.parametrize("size", [(96, 64), (64, 97), (200, 131), (40, 50), (64, 64), (333, 191)])
def test_the_dvaes_pictures_are_those_of_openais_notebook(size):
    picture = Image.fromarray(noise(*size))
    ratio = 64 / min(size)
    width, height = (round(ratio * edge) for edge in size)
    left, upper = int(round((width - 64) / 2.0)), int(round((height - 64) / 2.0))
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    expected = np.asarray(resized.crop((left, upper, left + 64, upper + 64))).astype(np.float32) / np.float32(255)
    assert np.array_equal(unit_transform(64)(picture).numpy(), expected.transpose(2, 0, 1))


def test_the_dvaes_pictures_become_rgb_before_resizing():
    picture = Image.fromarray(noise(90, 70)).convert("P")
    assert torch.equal(unit_transform(32)(picture), unit_transform(32)(picture.convert("RGB")))


def test_the_dvaes_transform_refuses_what_the_others_refuse():
    with pytest.raises(BadImage, match="no pixels"):
        unit_transform(8)(Image.new("RGB", (0, 5)))
    with pytest.raises(BadImage, match="too slender"):
        unit_transform(8)(Image.new("RGB", (1, 1000)))
    with pytest.raises(SettingsError, match="img_size"):
        unit_transform(0)


def test_pictures_come_back_from_their_tensors():
    picture = Image.fromarray(noise(16, 16))
    batch = torch.stack([clip_transform(16)(picture)] * 2)
    back = to_pictures(batch)
    assert [b.tobytes() for b in back] == [picture.tobytes()] * 2
    assert to_pictures(batch * 100)[0].getextrema() == ((0, 255),) * 3


@pytest.mark.parametrize(
    "make, settings",
    [
        (clip_transform, {"img_size": 0}),
        (clip_transform, {"img_size": 32, "resize": "longest"}),
        (clip_transform, {"img_size": 32, "interpolation": "bicubc"}),
        (clip_train_transform, {"img_size": 32, "scale": (0.0, 1.0)}),
        (clip_train_transform, {"img_size": 32, "ratio": (2.0, 1.0)}),
        (clip_train_transform, {"img_size": 32, "flip": 2.0}),
    ],
)
def test_settings_that_cannot_be_are_refused(make, settings):
    with pytest.raises(SettingsError):
        make(**settings)
