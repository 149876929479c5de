"""The card of Stable Diffusion's safety checker. Source: CompVis/stable-diffusion-safety-checker; the hash is that of
the file in the folders of Stable Diffusion 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.catalog.card import Card, Config
from zoo.hub import File

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.models.safety_checker import SafetyChecker


# --- what the rows refer to ---
def build(config: Config) -> SafetyChecker:
    """A checker of these sizes."""
    from zoo.models.safety_checker import SafetyChecker, SafetyCheckerConfig

    return SafetyChecker(SafetyCheckerConfig.from_dict(config))


def convert(state: Mapping[str, Tensor], config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The published layout, or ours, -> ours."""
    from zoo.converters.safety_checker import to_ours

    return to_ours(state, config)


# --- rows ---
CARDS = (
    Card(
        name="stable-diffusion-safety-checker",
        task="img_checking",
        family="safety-checker",
        files=(
            File(
                name="safety_checker/model.safetensors",
                repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
                sha256="9d6a233ff6fd5ccb9f76fd99618d73369c52dd3d8222376384d0e601911089e8",
                size=1_215_981_830,
            ),
        ),
        config={"embed": 768, "concepts": 17, "special": 3},
        build=build,
        convert=convert,
        params=303_981_588,
        licence="CreativeML OpenRAIL-M",
        languages=(),
        source="https://huggingface.co/CompVis/stable-diffusion-safety-checker",
    ),
)
