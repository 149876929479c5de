"""The card of LPIPS, the learnt distance of pictures, with VGG-16.

Sources: richzhang/PerceptualSimilarity, lpips/weights/v0.1 and LICENSE; torchvision's models/vgg.py and, for the
licence of its weights, timm/vgg16.tv_in1k. Hashes: the heads' is that of the file whose MD5, d507d734..., stands in
CompVis/taming-transformers, taming/util.py. Torchvision states the first eight digits of the other, in its name; the
whole is by the file's listing in Keiser41/mangaaa on the hub.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.catalog.card import Card, Config
from zoo.hub import File

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.metrics.lpips import Lpips


# --- what the rows refer to ---
def build(config: Config) -> Lpips:
    """The one size there is."""
    from zoo.metrics.lpips import Lpips

    return Lpips()


def convert(state: Mapping[str, Tensor], config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Any published layout -> ours, see zoo/metrics/lpips.py."""
    from zoo.metrics.lpips import to_ours

    return to_ours(state), {}


# --- rows ---
SOURCE = "https://github.com/richzhang/PerceptualSimilarity"

CARDS = (
    Card(
        name="lpips-vgg16",
        task="img_comparing",
        family="lpips",
        files=(
            File(
                name="vgg16-397923af.pth",
                url="https://download.pytorch.org/models/vgg16-397923af.pth",
                sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
                size=553_433_881,
            ),
            File(
                name="vgg.pth",
                url="https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1/vgg.pth",
                sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
                size=7_289,
            ),
        ),
        parts={"vgg16-397923af.pth": "", "vgg.pth": ""},
        build=build,
        convert=convert,
        params=14_716_160,
        licence="BSD-2-Clause; its VGG-16, torchvision's: BSD-3-Clause",
        languages=(),
        source=SOURCE,
    ),
)
