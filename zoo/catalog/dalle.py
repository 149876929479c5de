"""The cards of DALL-E: sizes to train, from the paper's family (Ramesh et al. 2021), what was trained with zoo, and
others' of one stream of text and codes.

OpenAI released the dVAE only. The paper's 2.8, 5.6 and 12 billion have 64 layers and heads of 64; 1.3 billion continues
that downwards, and 120 million is GPT-2's small one.

Sources of the others: kakaobrain/minDALL-E, README.md, configs/dalle-1.3B.yaml and dalle/models; ai-forever/ru-dalle,
rudalle/dalle. The files were not reached when these rows were written; no source states a sha256, so that nothing is
pinned, and sizes in bytes are those of the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.catalog.card import Card, Config
from zoo.catalog.dvae import transform as unit
from zoo.catalog.vqgan import F8, F16, SBER, SBER_LICENCE
from zoo.errors import DataError, WeightsMismatch
from zoo.hub import File

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
    """What `Trainer` writes, or a published layout, -> ours, see zoo/converters/dalle.py."""
    from zoo.converters.dalle import to_ours
    from zoo.models.dalle import DalleConfig

    state, sizes = to_ours(state, config)
    return state, asdict(DalleConfig.from_dict(sizes))


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
    return fitting(BpeTokenizer(files[names[0]], context_length=sizes["text_length"]), files[names[0]], sizes)


def char_bpe(config: Config, files: Mapping[str, Path]) -> Any:
    """minDALL-E's tokenizer. Raises DataError, and WeightsMismatch when it has more ids than the weights."""
    from zoo.tokenizers import CharBpeTokenizer

    sizes, (vocabulary, merges) = config["transformer"], (files[name] for name in CHAR_BPE)
    return fitting(CharBpeTokenizer(vocabulary, merges, sizes["text_length"]), vocabulary, sizes)


def yttm(config: Config, files: Mapping[str, Path]) -> Any:
    """ruDALL-E's tokenizer. Raises DataError, and WeightsMismatch when it has more ids than the weights."""
    from zoo.tokenizers import YttmTokenizer

    sizes = config["transformer"]
    return fitting(YttmTokenizer(files[YTTM], sizes["text_length"]), files[YTTM], sizes)


def fitting(found: Any, file: Path, sizes: Config) -> Any:
    """The tokenizer, if it has no more ids than the weights."""
    if found.vocab_size > sizes["text_vocab"]:
        raise WeightsMismatch(
            f"{file} has {found.vocab_size} ids and the weights {sizes['text_vocab']}: it is another's"
        )
    return found


# --- rows ---
OPENAI_DVAE = {"size": 256, "vocab": 8192, "hidden": 256, "groups": 4, "blocks": 2, "stem": 128, "decoder": True}
CHAR_BPE = ("tokenizer/bpe-16k-vocab.json", "tokenizer/bpe-16k-merges.txt")
YTTM = "bpe.model"
# No source says that one was trained on empty captions. Both are drawn from with top_k: 256, and 2048 (top_p=0.995).
MIN_DALLE = {
    "image": F16 | {"vocab": 16384},
    "transformer": {
        **{"text_vocab": 16384, "text_length": 64, "vocab": 16384, "grid": 16, "width": 1536, "depth": 42, "heads": 24},
        **{"attention": "full", "pads": False, "pad": 0, "positions": "flat", "norm": "pre", "activation": "gelu"},
        **{"head_norm": False, "head_bias": False},
    },
    "caption_dropout": 0.0,
}
RU_DALLE = {
    "image": F8,
    "transformer": {
        **{"text_vocab": 16384, "text_length": 128, "vocab": 8192, "grid": 32, "width": 2048, "depth": 24, "heads": 16},
        **{"attention": "sparse", "conv": "conv_clamped", "kernel": 11, "pads": True, "pad": 0, "positions": "axial"},
        **{"norm": "sandwich", "activation": "gelu_tanh", "head_norm": True, "head_bias": True},
    },
    "caption_dropout": 0.0,
    "empty": (2, 3),  # the ends of a caption
}
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


# The folder in its address is its md5, by the source's code.
MIN_DALLE_ARCHIVE = File(
    name="1.3B.tar.gz",
    url="https://arena.kakaocdn.net/brainrepo/models/minDALL-E/57b008f02ceaa02b779c8b7463143315/1.3B.tar.gz",
    size=4_720_000_000,
)
CARDS = (
    card(
        name="dalle-emoji-tiny",
        files=(
            File(
                name="model.safetensors",
                packaged="dalle-emoji-tiny/model.safetensors",
                sha256="9ddce6bf691cada24fccf0ec58bf638c05bc80f3e881f3a25d7ce100f5174bc5",
                size=16_471_384,
            ),
            File(
                name="bpe.json.gz",
                packaged="emoji_dalle_bpe.json.gz",
                sha256="9c0396ef17632760f0b2fd43ea5bd2fa1c932c47e19c94eea3afa3f3b4c222ad",
                size=18_849,
            ),
        ),
        config={
            "image": {"size": 64, "vocab": 1024, "hidden": 48, "stem": 64, "groups": 4, "blocks": 1, "decoder": True},
            "transformer": {
                "text_vocab": 2048,
                "text_length": 24,
                "vocab": 1024,
                "grid": 8,
                "width": 256,
                "depth": 6,
                "heads": 4,
                "attention": "sparse",
                "conv": "conv",
                "kernel": 7,
                "pads": True,
                "pad": 0,
                "positions": "axial",
                "norm": "pre",
                "activation": "gelu",
                "head_norm": False,
                "head_bias": False,
                "text_weight": 0.125,
            },
            "caption_dropout": 0.1,
            "code_dropout": 1.0,
            "empty": [],
            "guidance": 3.0,
        },
        params=8_201_070,
        licence="Apache-2.0",
        languages=("en", "zh"),
        source="examples/train_dalle.py; what it learnt from: zoo/assets/LICENSES",
        trained="from nothing on the emoji training split over dvae-emoji-tiny, English and Chinese captions, 1,900 "
        "steps of 64 pairs, 37 minutes on two CPU cores: python examples/train_dalle.py --codes once --code-dropout 1 "
        "--depth 6 --steps 1900 --precision bf16; then from those weights, packaged here at the time, 2,400 of 2,500 "
        "steps: --model dalle-emoji-tiny --codes once --code-dropout 1 --steps 2500 --lr 6e-4 --precision bf16; "
        "matrices in half precision, guidance of 3 unless another is given. "
        "Figures: how often clip-emoji-tiny puts the caption that was drawn before all others of the test split, for "
        "500 pictures, and where it has chosen the best of 8 itself: zoo eval text2img --temperature 0.7 --language en "
        "(or zh)",
        figures={
            "emoji_test_en_r1": 13.2,
            "emoji_test_en_r10": 31.6,
            "emoji_test_en_best_of_8_r1": 32.0,
            "emoji_test_zh_r1": 14.6,
            "emoji_test_zh_r10": 40.2,
            "emoji_test_zh_best_of_8_r1": 34.8,
        },
    ),
    card(
        name="dalle",
        licence="that of the weights",
        languages=(),
        source="a DALL-E of any size that zoo trained, given as weights=",
    ),
    to_train(
        "dalle-120m", 768, 12, 12, 220_863_110, "to train: `zoo train dalle --model dalle-120m`; GPT-2 small's sizes"
    ),
    to_train("dalle-1.3b", 1280, 64, 20, 1_420_626_566, "to train: the paper's depth and heads, continued downwards"),
    to_train("dalle-2.8b", 1920, 64, 30, 3_025_850_246, "to train: arXiv 2102.12092, appendix E"),
    to_train("dalle-5.6b", 2688, 64, 42, 5_782_590_854, "to train: arXiv 2102.12092, appendix E"),
    to_train("dalle-12b", 3968, 64, 62, 12_390_424_454, "to train: arXiv 2102.12092, appendix B"),
    card(
        name="mindalle-1.3b",
        files=tuple(
            File(name=name, size=size, archive=MIN_DALLE_ARCHIVE, path=f"1.3B/{name}")
            for name, size in (
                ("stage2_last.ckpt", 5_164_326_912),
                ("stage1_last.ckpt", 304_295_436),
                *((name, None) for name in CHAR_BPE),
            )
        ),
        parts={"stage2_last.ckpt": "", "stage1_last.ckpt": "vqgan."},
        config=MIN_DALLE,
        tokenizer=char_bpe,
        params=1_367_155_587,
        licence="CC-BY-NC-SA-4.0 (the code: Apache-2.0)",
        commercial=False,
        source="https://github.com/kakaobrain/minDALL-E",
    ),
    card(
        name="rudalle-malevich",
        files=(
            File(name="pytorch_model_v3.bin", repo="ai-forever/rudalle-Malevich", size=2_624_803_072),
            File(name=SBER, repo="ai-forever/rudalle-utils", size=346_000_000),
            File(name=YTTM, repo="ai-forever/rudalle-utils", size=224_000),
        ),
        parts={"pytorch_model_v3.bin": "", SBER: "vqgan."},
        config=RU_DALLE,
        tokenizer=yttm,
        params=1_379_142_531,
        licence=SBER_LICENCE,
        languages=("ru",),
        source="https://huggingface.co/ai-forever/rudalle-Malevich",
    ),
)
