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
                sha256="4f751200e87d7dc5fed9158ce3ca3bf60e3d0824627505bb6f4dce469e71c026",
                size=24_948_300,
            ),
            *clip_emoji.CARDS[0].files[1:],
        ),
        params=13_679_403,
        licence="Apache-2.0",
        languages=("en", "zh"),
        source="examples/train_stable_diffusion.py; what it learnt from: zoo/assets/LICENSES",
        trained="from nothing on the emoji training split, English and Chinese captions, over kl-vae-emoji-tiny and "
        "the text tower of clip-emoji-tiny, 3,000 steps of 64 pairs, 83 minutes on one or two CPU cores: python "
        "examples/train_stable_diffusion.py --cache once --views 2 --widths 64 128 192 --zero-snr --min-snr 0 "
        "--steps 3600 --lr 1e-3 --precision bf16; the average of its weights, matrices in half precision, those of "
        "the timesteps, GEGLU and the vocabulary in 8 bits. Figures: how often clip-emoji-tiny puts the caption that "
        "was drawn before all others of the test split, for 500 pictures by 20 steps of dpm++2m with guidance of 3: "
        "zoo eval text2img --model sd-emoji-tiny --candidates 1 --language en (or zh)",
        figures={
            "emoji_test_en_r1": 34.0,
            "emoji_test_en_r10": 78.4,
            "emoji_test_zh_r1": 34.4,
            "emoji_test_zh_r10": 78.6,
            "emoji_test_psnr": 20.82,
            "emoji_test_lpips": 0.143,
        },
    ),
)
