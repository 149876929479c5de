"""The CLIP that ships: small enough to load in a second, good enough to try everything on."""

from __future__ import annotations

from zoo.catalog.clip import card
from zoo.hub import File

CARDS = (
    card(
        name="clip-emoji-tiny",
        family="clip",
        files=(
            File(
                name="model.safetensors",
                packaged="clip-emoji-tiny/model.safetensors",
                sha256="49f81155fd98295d7a560417da5a8bf7a269c0902f933e2328a74e94a1a458f0",
                size=6_556_432,
            ),
            File(
                name="merges.txt.gz",
                packaged="emoji_bpe.txt.gz",
                sha256="6c3f19df1fbd2837d8da983c03b6a81211cc7be80e9e0a40d873a6fd3bdbc175",
                size=14_332,
            ),
        ),
        params=3_244_859,
        licence="Apache-2.0",
        languages=("en", "zh"),
        source="examples/train_clip.py; what it learnt from: zoo/assets/LICENSES",
        trained="from nothing on the emoji training split, English and Chinese captions, 160 epochs of 5,070 pictures, "
        "49 minutes on two CPU cores: python examples/train_clip.py --epochs 160 --batch-size 256 --precision bf16 "
        "--workers 1 --eval-interval 190 --save-interval 190; the last weights, matrices in half precision. "
        "Figures are of the test split, over all its 1,876 captions: zoo eval clip --language en (or zh)",
        figures={
            "emoji_test_en_i2t_r1": 82.7,
            "emoji_test_en_t2i_r1": 84.8,
            "emoji_test_zh_i2t_r1": 81.9,
            "emoji_test_zh_t2i_r1": 83.5,
        },
    ),
)
