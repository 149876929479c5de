"""What a training of a model that draws shows of its progress."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

PROMPTS = (  # concepts that the emoji test split draws in a style of its own
    *("red apple", "tulip", "cow face", "volcano", "oncoming police car", "candle", "bullseye", "thumbs up"),
    *("红心", "红苹果", "火山", "旗: 巴西", "drooling face", "flag: Brazil", "hot beverage", "guitar"),
)


def draw_samples(model: Any, path: Path, prompts: Sequence[str] = PROMPTS) -> None:
    """Draws each prompt; all ranks do, since each may hold a part of the weights, and the first writes."""
    from zoo import distributed
    from zoo.pictures import grid

    pictures = [drawn[0] for drawn in model.generate(prompts, progress=False)]
    if distributed.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        grid(pictures, 8, prompts, cell=128).save(path)
