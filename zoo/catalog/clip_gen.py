"""The cards of CLIP-GEN.

Sources: HFAiLab/clip-gen, its release v0.1.0, train_gpt.py and models/ (names, sizes, licence). The files were not
reached when these rows were written, and no source states a hash, so that nothing is pinned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.catalog import clip, clip_emoji
from zoo.catalog.card import Card, Config
from zoo.catalog.vqgan import CLIP_GEN, COCO
from zoo.catalog.vqgan import transform as unit
from zoo.errors import WeightsMismatch
from zoo.hub import File

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.data.transforms import UnitTransform
    from zoo.models.clip_gen import ClipGen


# --- what the rows refer to ---
def build(config: Config) -> ClipGen:
    """A CLIP-GEN of these sizes. Raises WeightsMismatch for a config with fields that zoo does not know."""
    from zoo.models.clip_gen import ClipGen, ClipGenConfig

    try:
        sizes = ClipGenConfig.from_dict(config)
    except TypeError as error:
        raise WeightsMismatch(f"the config is not one of a CLIP-GEN of this version of zoo: {error}") from error
    return ClipGen(sizes)


def convert(state: Mapping[str, Tensor], config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The release's layout, or what `Trainer` writes, -> ours, see zoo/converters/clip_gen.py."""
    from zoo.converters.clip_gen import to_ours
    from zoo.models.clip_gen import ClipGenConfig

    state, sizes = to_ours(state, config)
    return state, asdict(ClipGenConfig.from_dict(sizes))


def transform(config: Config) -> UnitTransform:
    """PIL picture -> tensor (3, size, size) of 0..1; the model prepares it for CLIP itself."""
    return unit(config["image"])


def tokenizer(config: Config, files: Mapping[str, Path]) -> Any:
    """CLIP's, see `zoo.catalog.clip`."""
    return clip.tokenizer(config["clip"], files)


# --- rows ---
B32 = {"embed": 512, "image": clip.B32, "text": clip.text(512)}
MEDIUM = {"embed": 512, "vocab": 16384, "grid": 16, "width": 1024, "depth": 24, "heads": 16, "dropout": 0.1}
LARGE = MEDIUM | {"width": 1280, "depth": 36, "heads": 20}
PARTS = {"gpt_coco.pt": "", "clip_vit_b32.pt": "clip.", "vqgan_coco.pt": "vqgan."}
NOT_TRAINED = 151_277_313 + 76_073_859  # CLIP and the VQGAN
card = partial(
    Card,
    task="text2img",
    family="clip-gen",
    build=build,
    convert=convert,
    tokenizer=tokenizer,
    transform=transform,
)


def to_train(name: str, transformer: Config, params: int, source: str) -> Card:
    """A size without weights, over the release's CLIP and VQGAN."""
    return card(
        name=name,
        config={"clip": B32, "image": COCO, "transformer": transformer},
        params=NOT_TRAINED + params,
        licence="that of the weights you train",
        languages=(),
        source=source,
    )


CARDS = (
    card(
        name="clip-gen-emoji-tiny",
        files=(
            File(
                name="model.safetensors",
                packaged="clip-gen-emoji-tiny/model.safetensors",
                sha256="fea48ceddad1397e2f369c0e453e72a755bf0919c046be87687138eda9d46cac",
                size=19_730_012,
            ),
            *clip_emoji.CARDS[0].files[1:],
        ),
        params=9_787_998,
        licence="Apache-2.0",
        languages=("en", "zh"),
        source="examples/train_clip_gen.py; what it learnt from: zoo/assets/LICENSES",
        trained="from nothing on the pictures of the emoji training split, without captions, over vqgan-emoji-tiny and "
        "clip-emoji-tiny, 1,500 steps of 64 pictures, 13 minutes on two CPU cores: python examples/train_clip_gen.py "
        "--cache once --depth 5 --noise 0.5 --steps 1500 --lr 1.5e-3 --precision bf16; matrices in half precision, "
        "guidance of 2 unless another is given. Figures: how often clip-emoji-tiny, which it is conditioned on, puts "
        "the caption that was drawn before all others of the test split, for 500 pictures, and where it has chosen the "
        "best of 8 itself: zoo eval text2img --model clip-gen-emoji-tiny --temperature 0.7 --language en (or zh). The "
        "judge is another: train_clip.py --seed 77 --batch-size 256 --steps 420 --precision bf16, which finds 35.7 % "
        "of real pictures; given as --judge",
        figures={
            "emoji_test_en_r1": 17.2,
            "emoji_test_en_r10": 48.2,
            "emoji_test_en_best_of_8_r1": 40.4,
            "emoji_test_zh_r1": 16.8,
            "emoji_test_zh_r10": 48.0,
            "emoji_test_zh_best_of_8_r1": 40.2,
            "emoji_test_en_r1_by_a_judge": 6.4,
            "emoji_test_en_best_of_8_r1_by_a_judge": 6.2,
        },
    ),
    card(
        name="clip-gen",
        parts=PARTS,
        licence="that of the weights",
        languages=(),
        source="a CLIP-GEN of any size, of the release or zoo, given as weights=",
    ),
    # Drawn from with top_k=500 and top_p=0.95; of 64 candidates CLIP's best 8 were shown.
    card(
        name="clip-gen-coco",
        files=tuple(File(name=name, url=f"{CLIP_GEN}/releases/download/v0.1.0/{name}") for name in PARTS),
        parts=PARTS,
        config={"clip": B32, "image": COCO, "transformer": MEDIUM},
        params=NOT_TRAINED + 336_669_696,
        licence="MIT (its CLIP: OpenAI's, MIT, which asks for research use, not deployment)",
        commercial=False,
        source=CLIP_GEN,
    ),
    to_train("clip-gen-medium", MEDIUM, 336_669_696, "to train: the release's sizes, gpt2_medium of its models/gpt.py"),
    to_train("clip-gen-large", LARGE, 751_334_144, "to train: gpt2_large of the release's models/gpt.py"),
)
