"""The card of the small Stable Diffusion that ships with zoo."""

from __future__ import annotations

from zoo.catalog import clip_emoji
from zoo.catalog.stable_diffusion import card
from zoo.hub import File

CARDS = (
    card(
        name="sd-emoji-tiny",
        files=(
            File(
                name="model.safetensors",
                packaged="sd-emoji-tiny/model.safetensors",
                sha256="SHA",
                size=0,
            ),
            *clip_emoji.CARDS[0].files[1:],
        ),
        params=0,
        licence="Apache-2.0",
        languages=("en", "zh"),
        source="examples/train_stable_diffusion.py; what it learnt from: zoo/assets/LICENSES",
        trained="from nothing on the emoji training split, English and Chinese captions, over kl-vae-emoji-tiny and "
        "the text tower of clip-emoji-tiny, 3,600 steps of 64 pairs, 90 minutes on one or two CPU cores: python "
        "examples/train_stable_diffusion.py --cache once --views 2 --widths 64 128 192 --zero-snr --min-snr 0 --steps "
        "3600 --lr 1e-3 --precision bf16; the average of its weights, matrices and kernels in half precision. Figures: "
        "how often clip-emoji-tiny puts the caption that was drawn before all others of the test split, for 500 "
        "pictures by 20 steps of dpm++2m with guidance of 3, and where it has chosen the best of 8 itself: zoo eval "
        "text2img --model sd-emoji-tiny --language en (or zh)",
        figures={},
    ),
)
