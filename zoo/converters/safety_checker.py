"""The safety checker's published weights -> ours. Facts: diffusers, pipelines/stable_diffusion/safety_checker.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoo.converters.clip_names import HUGGING_FACE

OURS = {
    "visual_projection.weight": "image.project.weight",
    "concept_embeds": "concepts",
    "concept_embeds_weights": "concepts_thresholds",
    "special_care_embeds": "special",
    "special_care_embeds_weights": "special_thresholds",
}


def to_ours(state: Mapping[str, Tensor], config: Mapping) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Published, or ours, -> ours and its config. What is unknown keeps its name, so that strict loading reports it."""
    import torch

    # Files before transformers 5.6 have vision_model twice, and all a buffer that is computed.
    left = {re.sub(r"^vision_model\.(vision_model\.)?", "vision_model.", name): t for name, t in state.items()}
    left = {name: tensor for name, tensor in left.items() if not name.endswith("position_ids")}
    depth = 1 + max((int(n) for name in left for n in re.findall(r"\.layers\.(\d+)\.", name)), default=0)
    ours = {}
    for name, theirs in HUGGING_FACE[0].pairs(depth):
        if name.startswith("image.") and all(their in left for their in theirs):
            parts = [left.pop(their) for their in theirs]
            ours[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    ours |= {OURS.get(name, name): tensor for name, tensor in left.items()}
    return ours, {name: config[name] for name in ("image", "embed", "concepts", "special") if name in config}
