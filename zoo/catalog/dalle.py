"""The cards of DALL-E: sizes to train, from the paper's family (Ramesh et al. 2021), and what was trained with zoo.

OpenAI released the dVAE only. The paper's 2.8, 5.6 and 12 billion have 64 layers and heads of 64; 1.3 billion continues
that downwards, and 120 million is GPT-2's small one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.catalog.card import Card, Config
from zoo.catalog.dvae import transform as unit
from zoo.errors import DataError, WeightsMismatch

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.models.dalle import Dalle


# --- what the rows refer to ---
def build(config: Config) -> Dalle:
    """A DALL-E of these sizes. Raises WeightsMismatch for a config with fields that zoo does not know."""
    from zoo.models.dalle import Dalle, DalleConfig

    try:
        sizes = DalleConfig.from_dict(config)
    except TypeError as error:
        raise WeightsMismatch(f"the config is not one of a DALL-E of this version of zoo: {error}") from error
    return Dalle(sizes)


def convert(state: Mapping[str, Tensor], config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `Trainer` writes is ours already. Raises WeightsMismatch without the config that lies beside it."""
    from zoo.models.dalle import DalleConfig

    sizes = {name: config[name] for name in ("image", "transformer", "caption_dropout") if name in config}
    if "image" not in sizes or "transformer" not in sizes:
        raise WeightsMismatch("the sizes of this DALL-E are not known: its config.json must lie beside the weights")
    return dict(state), asdict(DalleConfig.from_dict(sizes))


def transform(config: Config) -> Any:
    """PIL picture -> tensor (3, size, size) of 0..1."""
    return unit(config["image"])


def tokenizer(config: Config, files: Mapping[str, Path]) -> Any:
    """The BPE whose file lies beside the weights. Raises DataError when there is none, WeightsMismatch when it has more
    ids than the weights."""
    from zoo.tokenizers import BpeTokenizer

    sizes = config["transformer"]
    names = [name for name in ("bpe.json.gz", "bpe.json", "tokenizer.json") if name in files]
    if not names:
        raise DataError("this model's tokenizer needs bpe.json.gz, bpe.json or tokenizer.json beside the weights")
    found = BpeTokenizer(files[names[0]], context_length=sizes["text_length"])
    if found.vocab_size > sizes["text_vocab"]:
        raise WeightsMismatch(
            f"{files[names[0]]} has {found.vocab_size} ids and the weights {sizes['text_vocab']}: it is another's"
        )
    return found


# --- rows ---
OPENAI_DVAE = {"size": 256, "vocab": 8192, "hidden": 256, "groups": 4, "blocks": 2, "stem": 128, "decoder": True}
PAPER = {"text_vocab": 16384, "text_length": 256, "vocab": 8192, "grid": 32}
card = partial(
    Card, task="text2img", family="dalle", build=build, convert=convert, tokenizer=tokenizer, transform=transform
)


def to_train(name: str, width: int, depth: int, heads: int, params: int, source: str) -> Card:
    """A size without weights, over OpenAI's dVAE (97,616,006 of the parameters, which are not trained)."""
    transformer = PAPER | {"width": width, "depth": depth, "heads": heads}
    return card(
        name=name,
        config={"image": OPENAI_DVAE, "transformer": transformer},
        params=params,
        dtype="bfloat16",
        licence="that of the weights you train",
        languages=(),
        source=source,
    )


CARDS = (
    card(
        name="dalle",
        licence="that of the weights",
        languages=(),
        source="a DALL-E of any size that zoo trained, given as weights=",
    ),
    to_train("dalle-120m", 768, 12, 12, 0, "to train: `zoo train dalle --model dalle-120m`; GPT-2 small's sizes"),
    to_train("dalle-1.3b", 1280, 64, 20, 0, "to train: the paper's depth and heads, continued downwards"),
    to_train("dalle-2.8b", 1920, 64, 30, 0, "to train: arXiv 2102.12092, appendix E"),
    to_train("dalle-5.6b", 2688, 64, 42, 0, "to train: arXiv 2102.12092, appendix E"),
    to_train("dalle-12b", 3968, 64, 62, 0, "to train: arXiv 2102.12092, appendix B"),
)
