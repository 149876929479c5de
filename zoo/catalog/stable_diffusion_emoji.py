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
                sha256="fbd300660bc25289d256696baef294e7076e482784604a66128c304ae4b7eec1",
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
        "--steps 3600 --lr 1e-3 --precision bf16 --run-folder RUN; then 1,725 more, 45 minutes on one core that "
        "other work shared: the same with --model RUN/best --steps 2300 --lr 6e-4 --warm-up 0.03; both were stopped "
        "before their ends. The average of its weights, matrices in half precision, those of the timesteps, GEGLU "
        "and the vocabulary in 8 bits. Figures: how often clip-emoji-tiny puts the caption that was drawn before all "
        "others of the test split, for 500 pictures by 20 steps of dpm++2m with guidance of 3: zoo eval text2img "
        "--model sd-emoji-tiny --candidates 1 --language en (or zh)",
        figures={
            "emoji_test_en_r1": 43.8,
            "emoji_test_en_r10": 88.0,
            "emoji_test_zh_r1": 46.0,
            "emoji_test_zh_r10": 89.4,
            "emoji_test_psnr": 20.82,
            "emoji_test_lpips": 0.143,
        },
    ),
)
