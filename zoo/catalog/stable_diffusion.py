"""The cards of Stable Diffusion.

Sources: CompVis/stable-diffusion and Stability-AI/stablediffusion, README.md and configs; the configs and LFS pointers
of the folders on the hub (sizes, hashes); Nota-NetsPresso/BK-SDM and segmind/distill-sd. A file without sha256 is one
whose hash no source states: it is not pinned. Stability AI took version 2 off the hub in November 2025; the rows name
mirrors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.catalog.card import Card, Config
from zoo.catalog.kl_vae import STABLE_DIFFUSION as KL_F8
from zoo.catalog.kl_vae import V1_FILE as V1_VAE
from zoo.errors import DataError, WeightsMismatch
from zoo.hub import File

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.data.transforms import UnitTransform
    from zoo.models.stable_diffusion import StableDiffusion


# --- what the rows refer to ---
def build(config: Config) -> StableDiffusion:
    """A Stable Diffusion of these sizes. Raises WeightsMismatch for a config with fields that zoo does not know."""
    from zoo.models.stable_diffusion import StableDiffusion, StableDiffusionConfig

    try:
        sizes = StableDiffusionConfig.from_dict(config)
    except TypeError as error:
        raise WeightsMismatch(f"the config is not one of a Stable Diffusion of this version of zoo: {error}") from error
    return StableDiffusion(sizes)


def convert(state: Mapping[str, Tensor], config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Any published layout -> ours, see zoo/converters/stable_diffusion.py."""
    from zoo.converters.stable_diffusion import to_ours
    from zoo.models.stable_diffusion import StableDiffusionConfig

    state, sizes = to_ours(state, config)
    return state, asdict(StableDiffusionConfig.from_dict(sizes))


def transform(config: Config) -> UnitTransform:
    """PIL picture -> tensor (3, H, W) of 0..1, as large as the pictures that it was trained on."""
    from zoo.data.transforms import unit_transform

    return unit_transform(config["unet"]["size"] << (len(config["vae"]["widths"]) - 1))


def tokenizer(config: Config, files: Mapping[str, Path]) -> Any:
    """The tokenizer of the text tower, from the files that are there: a merges.txt of CLIP's kind (without one,
    OpenAI's is taken), or a BERT or XLM-R vocabulary.

    Raises DataError when there is none, WeightsMismatch when its ids are not those of the weights.
    """
    from zoo.converters.text_encoder import tower_of

    text, wanted = config["text"], tower_of(config["text"]).tokenizer
    found = _clip(config, files) if wanted == "clip" else _bert(wanted, config, files)
    ends = {"start": found.start_token, "end": found.end_token, "pad": found.pad}
    if found.vocab_size > text["vocab"] or any(config[name] != id for name, id in ends.items()):
        raise WeightsMismatch(
            f"the tokenizer has {found.vocab_size} ids, of which {ends}, and the weights have {text['vocab']} and were "
            f"trained with { ({name: config[name] for name in ends}) }: put the vocabulary that the model was trained "
            "with beside the weights"
        )
    return found


def _clip(config: Config, files: Mapping[str, Path]) -> Any:
    from zoo.tokenizers import ClipTokenizer
    from zoo.tokenizers.files import read_json

    merges = next((files[name] for name in MERGES if name in files), None)
    found = ClipTokenizer(merges, config["window"], pad=config["pad"])
    whole = next((files[name] for name in WHOLE if name in files), None)
    if whole and not merges and read_json(whole, "a tokenizer.json").get("model", {}).get("vocab") != found.encoder:
        raise DataError(f"{whole} holds another vocabulary than OpenAI's: put its merges.txt beside it")
    return found


def _bert(kind: str, config: Config, files: Mapping[str, Path]) -> Any:
    from zoo.tokenizers import TransformersTokenizer

    names = XLMR_FILES if kind == "xlm-roberta" else BERT_FILES
    here = [files[name].parent for name in (*names, *WHOLE) if name in files]
    if not here:
        raise DataError(f"this model's tokenizer needs {names[0]} or {WHOLE[0]} beside the weights")
    return TransformersTokenizer.from_folder(here[0], kind, config["window"])


MERGES = ("merges.txt.gz", "tokenizer/merges.txt", "merges.txt")
WHOLE = ("tokenizer/tokenizer.json", "tokenizer.json")
BERT_FILES = ("tokenizer/vocab.txt", "vocab.txt")
XLMR_FILES = ("tokenizer/sentencepiece.bpe.model", "sentencepiece.bpe.model")

# --- sizes ---
NOISE = {"steps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "shape": "scaled_linear", "prediction": "epsilon"}
NOISE |= {"zero_snr": False, "offset": 1, "last_alpha_one": False}
V = NOISE | {"prediction": "v"}
UNET = {"channels": 4, "out": 4, "widths": (320, 640, 1280, 1280), "blocks": 2, "attention": (0, 1, 2), "depth": 1}
UNET |= {"heads": (8, 8, 8, 8), "context": 768, "mid": True, "linear": False, "upcast": False, "groups": 32, "size": 64}
UNET_2 = UNET | {"heads": (5, 10, 20, 20), "context": 1024, "linear": True}
SMALL = UNET | {"blocks": 1}
NO_MID = SMALL | {"mid": False}
THREE_LEVELS = NO_MID | {"widths": (320, 640, 1280), "heads": (8, 8, 8)}
CLIP_L = {"context": 77, "vocab": 49408, "width": 768, "depth": 12, "heads": 12, "mlp_ratio": 4.0}
CLIP_L |= {"activation": "quick_gelu"}
OPENCLIP_H = CLIP_L | {"width": 1024, "depth": 23, "heads": 16, "activation": "gelu"}
CLIP_ENDS = {"start": 49406, "end": 49407, "window": 77}
V1 = {"text": CLIP_L, "unet": UNET, "vae": KL_F8, "noise": NOISE, "pad": 49407, **CLIP_ENDS}
V2 = {"text": OPENCLIP_H, "unet": UNET_2, "vae": KL_F8, "noise": NOISE, "pad": 0, **CLIP_ENDS}
V2_768 = V2 | {"unet": UNET_2 | {"size": 96, "upcast": True}, "vae": KL_F8 | {"size": 768}, "noise": V}

# --- rows ---
card = partial(
    Card,
    task="text2img",
    family="stable-diffusion",
    build=build,
    convert=convert,
    tokenizer=tokenizer,
    transform=transform,
    licence="CreativeML OpenRAIL-M",
)
SAFE = ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors")
SAFE += ("text_encoder/model.safetensors",)
PICKLED = ("unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin")
PREFIXES = ("unet.", "vae.", "text_encoder.")
Pin = tuple[str | None, int | None]  # sha256 and bytes, as far as a source states them
UNKNOWN: Pin = (None, None)
V1_PINS: tuple[Pin, ...] = (UNKNOWN, (V1_VAE["sha256"], V1_VAE["size"]), UNKNOWN)


def hub(
    name: str,
    repo: str,
    config: Config,
    params: int,
    pins: tuple[Pin, ...] = (UNKNOWN,) * 3,
    parts: tuple[str, ...] = SAFE,
    **row: Any,
) -> Card:
    """A model whose folder lies on the hub: UNet, autoencoder and text tower, in this order."""
    files = [File(name=n, repo=repo, sha256=sha256, size=size) for n, (sha256, size) in zip(parts, pins, strict=True)]
    beside = [File(name=tokenizer_file, repo=repo) for tokenizer_file in row.pop("beside", ())]
    return card(
        name=name,
        files=(*files, *beside),
        parts=dict(zip(parts, PREFIXES, strict=True)),
        config=config,
        params=params,
        **{"source": f"https://huggingface.co/{repo}", **row},
    )


def single(name: str, repo: str, sha256: str | None = None, size: int | None = None) -> File:
    """All of a model in CompVis's layout."""
    return File(name=name, repo=repo, sha256=sha256, size=size)


V1_PARAMS = 1_066_235_307
V2_PARAMS = 1_289_952_427
MIRROR, SECOND_MIRROR = "sd2-community/stable-diffusion-{}", "Manojb/stable-diffusion-{}"
V2_LICENCE = "CreativeML OpenRAIL++-M"
V21_BASE = "v2-1_512-ema-pruned.safetensors"
V21_BASE_PIN: Pin = ("df955bdf6b682338ea9b55dfc0d8f3475aadf4836e204893d28b82355e0956d2", 5_214_604_494)

CARDS = (
    card(
        name="stable-diffusion",
        licence="that of the weights",
        languages=(),
        source="a Stable Diffusion of any size, as diffusers, CompVis, Stability AI or zoo wrote it, given as weights=",
    ),
    *(hub(f"stable-diffusion-v1-{n}", f"CompVis/stable-diffusion-v1-{n}", V1, V1_PARAMS) for n in (1, 2, 3)),
    hub(
        "stable-diffusion-v1-4",
        "CompVis/stable-diffusion-v1-4",
        V1,
        V1_PARAMS,
        (("145a07e0f05ec5bbe6e2e9faf608bdb311caf708895cac8c8ed713c59864e1e8", 3_438_167_534), *V1_PINS[1:]),
    ),
    hub(
        "stable-diffusion-v1-5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        V1,
        V1_PARAMS,
        (
            ("19da7aaa4b880e59d56843f1fcb4dd9b599c28a1d9d9af7c1143057c8ffae9f1", 3_438_167_540),
            V1_PINS[1],
            ("d008943c017f0092921106440254dbbe00b6a285f7883ec8ba160c3faad88334", 492_265_874),
        ),
        alternatives=(
            single(
                "v1-5-pruned-emaonly.safetensors",
                "stable-diffusion-v1-5/stable-diffusion-v1-5",
                "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
                4_265_146_304,
            ),
        ),
    ),
    hub(
        "stable-diffusion-inpainting-v1-5",
        "stable-diffusion-v1-5/stable-diffusion-inpainting",
        V1 | {"unet": UNET | {"channels": 9}},
        V1_PARAMS + 14_400,
        parts=PICKLED,
    ),
    hub(
        "stable-diffusion-2-base",
        SECOND_MIRROR.format("2-base"),
        V2,
        V2_PARAMS,
        licence=V2_LICENCE,
        source="https://github.com/Stability-AI/stablediffusion",
    ),
    hub(
        "stable-diffusion-2-1-base",
        MIRROR.format("2-1-base"),
        V2,
        V2_PARAMS,
        (
            ("6dfae3e5f7d459b50f4b0850ead945972c75bb0e1897628933e169eb43974214", 3_463_726_498),
            ("a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815", 334_643_276),
            ("cce6febb0b6d876ee5eb24af35e27e764eb4f9b1d0b7c026c8c3333d4cfc916c", 1_361_597_018),
        ),
        alternatives=tuple(single(V21_BASE, m.format("2-1-base"), *V21_BASE_PIN) for m in (MIRROR, SECOND_MIRROR)),
        licence=V2_LICENCE,
        source="https://github.com/Stability-AI/stablediffusion",
    ),
    hub(
        "stable-diffusion-2-1",
        MIRROR.format("2-1"),
        V2_768,
        V2_PARAMS,
        licence=V2_LICENCE,
        source="https://github.com/Stability-AI/stablediffusion",
    ),
    # Pruned and distilled; of each the autoencoder and the text tower are those of version 1.
    *(
        hub(name, repo, V1 | {"unet": unet}, params + V1_PARAMS - 859_520_964, parts=PICKLED)
        for name, repo, unet, params in (
            ("bk-sdm-base", "nota-ai/bk-sdm-base", SMALL, 579_384_964),
            ("bk-sdm-small", "nota-ai/bk-sdm-small", NO_MID, 482_346_884),
            ("bk-sdm-tiny", "nota-ai/bk-sdm-tiny", THREE_LEVELS, 323_384_964),
            ("small-sd", "segmind/small-sd", SMALL, 579_384_964),
            ("tiny-sd", "segmind/tiny-sd", THREE_LEVELS, 323_384_964),
        )
    ),
)
