"""The cards of DALL-E mini and mega.

Sources: borisdayma/dalle-mini, README.md and tools/inference/inference_pipeline.ipynb (names, licence);
kuprel/min-dalle, min_dalle/min_dalle.py (names, sizes of the networks). The files were not reached when these rows were
written, and no source states a hash, so that nothing is pinned. Unverified: that vocab.json and merges.txt lie beside
the source's weights on the hub, as they do in its W&B artifacts. Sizes in bytes are those of the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.catalog.card import Card, Config
from zoo.catalog.vqgan import F16
from zoo.catalog.vqgan import transform as unit
from zoo.errors import DataError, WeightsMismatch
from zoo.hub import File

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.data.transforms import UnitTransform
    from zoo.models.dalle import Dalle
    from zoo.tokenizers import DalleMiniTokenizer


# --- what the rows refer to ---
def build(config: Config) -> Dalle:
    """A DALL-E mini of these sizes. Raises WeightsMismatch for a config with fields that zoo does not know."""
    from zoo.models.dalle_mini import DalleMiniConfig, dalle_mini

    try:
        sizes = DalleMiniConfig.from_dict(config)
    except TypeError as error:
        raise WeightsMismatch(f"the config is not one of a DALL-E mini of this version of zoo: {error}") from error
    return dalle_mini(sizes)


def convert(state: Mapping[str, Tensor], config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Either published layout -> ours, see zoo/converters/dalle_mini.py."""
    from zoo.converters.dalle_mini import to_ours

    return to_ours(state, config)


def transform(config: Config) -> UnitTransform:
    """PIL picture -> tensor (3, size, size) of 0..1."""
    return unit(config["image"])


def tokenizer(config: Config, files: Mapping[str, Path], suffix: str = "") -> DalleMiniTokenizer:
    """The tokenizer of vocab.json and merges.txt, each with the suffix in its name, or without if there is none such.

    Raises DataError when one is missing, WeightsMismatch when it has more ids than the weights.
    """
    from zoo.tokenizers import DalleMiniTokenizer

    for end in (suffix, ""):
        names = f"vocab{end}.json", f"merges{end}.txt"
        if all(name in files for name in names):
            break
    else:
        raise DataError(f"this model's tokenizer needs {' and '.join(names)} beside the weights")
    sizes = config["transformer"]
    found = DalleMiniTokenizer(*(files[name] for name in names), sizes["text_length"])
    if found.vocab_size > sizes["text_vocab"]:
        raise WeightsMismatch(
            f"{files[names[0]]} has {found.vocab_size} ids and the weights {sizes['text_vocab']}: it is another's"
        )
    return found


# --- rows ---
# The start token and the spread of the first weights are left to the published config.json.
BOTH = {"text_length": 64, "pad": 1, "vocab": 16384, "grid": 16}
MINI = BOTH | {"text_vocab": 50264, "rows": 16385, "width": 1024, "depth": 12, "heads": 16, "hidden": 2730}
MEGA = BOTH | {"text_vocab": 50272, "rows": 16416, "width": 2048, "depth": 24, "heads": 32, "hidden": 4096}
VQGAN = F16 | {"vocab": 16384, "black": 0.0}
VQGAN_FILE = File(
    name="vqgan.msgpack",
    repo="dalle-mini/vqgan_imagenet_f16_16384",
    path="flax_model.msgpack",
    size=304_295_436,
)
FLAX = {"flax_model.msgpack": "", "vqgan.msgpack": "vqgan."}
HUB = "https://huggingface.co/"
card = partial(
    Card,
    task="text2img",
    family="dalle-bart",
    build=build,
    convert=convert,
    tokenizer=tokenizer,
    transform=transform,
    licence="Apache-2.0 (its VQGAN: a port of taming's of ImageNet, MIT)",
)


def of_source(name: str, transformer: Config, params: int, size: int) -> Card:
    """borisdayma/dalle-mini's own weights, of full precision."""
    repo = f"dalle-mini/{name}"
    return card(
        name=name,
        files=(
            File(name="flax_model.msgpack", repo=repo, size=size),
            VQGAN_FILE,
            File(name="vocab.json", repo=repo),
            File(name="merges.txt", repo=repo),
        ),
        parts=FLAX,
        config_file=File(name="config.json", repo=repo),
        config={"image": VQGAN, "transformer": transformer},
        params=params,
        source=HUB + repo,
    )


def of_min_dalle(name: str, transformer: Config, params: int, suffix: str, sizes: tuple[int, int]) -> Card:
    """The same weights in half precision, with the half of the VQGAN that draws: they cannot encode a picture."""
    repo = "kuprel/min-dalle"
    parts = {f"encoder{suffix}.pt": "encoder.", f"decoder{suffix}.pt": "decoder.", "detoker.pt": "vqgan."}
    weights = (File(name=name, repo=repo, size=size) for name, size in zip(parts, (*sizes, 186_839_564), strict=True))
    words = (File(name=name, repo=repo) for name in (f"vocab{suffix}.json", f"merges{suffix}.txt"))
    return card(
        name=name,
        files=(*weights, *words),
        parts=parts,
        config={"image": VQGAN | {"encoder": False}, "transformer": transformer},
        tokenizer=partial(tokenizer, suffix=suffix),
        params=params,
        source=HUB + repo,
    )


CARDS = (
    card(
        name="dalle-bart",
        parts=FLAX,
        licence="that of the weights",
        source="a DALL-E mini of any size, of the source's layout or zoo's, given as weights=",
    ),
    of_source("dalle-mini", MINI, 513_907_571, 1_751_334_848),
    of_source("dalle-mega", MEGA, 2_663_594_883, 10_350_084_096),
    of_min_dalle("dalle-mini-fp16", MINI, 484_543_603, "_mini", (405_182_448, 470_484_976)),
    of_min_dalle("dalle-mega-fp16", MEGA, 2_634_230_915, "", (2_220_044_288, 2_954_997_760)),
)
