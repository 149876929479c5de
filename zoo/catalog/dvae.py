"""The cards of DALL-E's discrete VAE.

Sources: openai/DALL-E, notebooks/usage.ipynb (addresses and preprocessing) and LICENSE; transformers' FLAVA
(preprocessing). No source states a hash, so that nothing is pinned; the sizes in bytes are those of the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from zoo.catalog.card import Card, Config
from zoo.errors import WeightsMismatch
from zoo.hub import File

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.data.transforms import ClipTransform, UnitTransform
    from zoo.models.dvae import Dvae


# --- what the rows refer to ---
def build(config: Config) -> Dvae:
    """A dVAE of these sizes. Raises WeightsMismatch for a config with fields that zoo does not know."""
    from zoo.models.dvae import Dvae, DvaeConfig

    try:
        sizes = DvaeConfig.from_dict(config)
    except TypeError as error:
        raise WeightsMismatch(f"the config is not one of a dVAE of this version of zoo: {error}") from error
    return Dvae(sizes)


def convert(state: Mapping[str, Tensor], config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """OpenAI's or FLAVA's layout -> ours, see zoo/converters/dvae.py."""
    from zoo.converters.dvae import to_ours

    return to_ours(state, config)


def transform(config: Config) -> UnitTransform:
    """PIL picture -> tensor (3, size, size) of 0..1, as OpenAI's notebook does it."""
    from zoo.data.transforms import unit_transform

    return unit_transform(config["size"])


def flava_transform(config: Config) -> ClipTransform:
    """PIL picture -> tensor (3, size, size) of 0..1, both edges scaled, as transformers does it for FLAVA."""
    from zoo.data.transforms import clip_transform

    return clip_transform(config["size"], (0.0,) * 3, (1.0,) * 3, resize="squash", interpolation="lanczos")


# --- rows ---
SIZES = {"vocab": 8192, "hidden": 256, "groups": 4, "blocks": 2}
OPENAI = {"encoder.pkl": "encoder.", "decoder.pkl": "decoder."}
card = partial(
    Card, task="img_tokenizing", family="dvae", build=build, convert=convert, transform=transform, languages=()
)

CARDS = (
    card(
        name="dvae",
        parts=OPENAI,
        licence="that of the weights",
        source="a dVAE of any size, of OpenAI, FLAVA or zoo, given as weights=",
    ),
    card(
        name="dvae-emoji-tiny",
        files=(
            File(
                name="model.safetensors",
                packaged="dvae-emoji-tiny/model.safetensors",
                sha256="482e35c9ced30942b147f07d636f964fc0f5a0f2c48ea9ba349d296ac9415f8d",
                size=3_765_464,
            ),
        ),
        config={"size": 64, "vocab": 1024, "hidden": 48, "groups": 4, "blocks": 1, "stem": 64, "decoder": True},
        params=1_872_750,
        licence="Apache-2.0",
        source="examples/train_dvae.py; what it learnt from: zoo/assets/LICENSES",
        trained="from nothing on the emoji training split, 3,600 steps of 32 pictures, 40 minutes on two CPU cores: "
        "python examples/train_dvae.py --steps 3600 --precision bf16 --kl-weight 0 --evenness 0.1 "
        "--temperature-steps 0.4 --lr 2e-3; the average of its weights, kernels in half precision. Figures are of the "
        "test split: zoo eval dvae --lpips vgg16.ckpt",
        figures={
            "emoji_test_psnr": 19.95,
            "emoji_test_lpips": 0.298,
            "emoji_test_code_usage": 0.557,
            "emoji_test_code_perplexity": 374.0,
        },
    ),
    card(
        name="dvae-openai",
        files=(
            File(name="encoder.pkl", url="https://cdn.openai.com/dall-e/encoder.pkl", size=215_144_960),
            File(name="decoder.pkl", url="https://cdn.openai.com/dall-e/decoder.pkl", size=175_319_064),
        ),
        parts=OPENAI,
        config=SIZES | {"size": 256, "stem": 128, "decoder": True},
        params=97_616_006,
        licence="Modified MIT (asks to say clearly that the dVAE was used)",
        source="https://github.com/openai/DALL-E",
    ),
    card(
        name="dvae-flava",
        files=(File(name="pytorch_model.bin", repo="facebook/flava-image-codebook", size=215_144_960),),
        config=SIZES | {"size": 112, "decoder": False},
        transform=flava_transform,
        params=53_786_240,
        licence="BSD-3-Clause",
        source="https://huggingface.co/facebook/flava-image-codebook",
    ),
)
