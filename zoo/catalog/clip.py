"""The cards of the CLIP family.

Figures and hashes: openai/CLIP, clip/clip.py; open_clip, docs/openclip_results.csv and docs/PRETRAINED.md.
A file without sha256 is one whose hash no source states: it is not pinned.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.catalog.card import Card, Config
from zoo.errors import DataError, WeightsMismatch
from zoo.hub import File

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.data.transforms import ClipTransform
    from zoo.models.clip import Clip


# --- what the rows refer to ---
def build(config: Config) -> Clip:
    """A CLIP of these sizes. Raises WeightsMismatch for a config with fields that zoo does not know."""
    from zoo.models.clip import Clip, ClipConfig

    try:
        sizes = ClipConfig.from_dict(config)
    except TypeError as error:
        raise WeightsMismatch(f"the config is not one of a CLIP of this version of zoo: {error}") from error
    return Clip(sizes)


def convert(state: Mapping[str, Tensor], config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Any published CLIP layout -> ours, see zoo/converters/clip.py."""
    from zoo.converters.clip import to_ours

    return to_ours(state, config)


def transform(config: Config) -> ClipTransform:
    """PIL picture -> tensor (3, size, size), preprocessed as the weights were trained."""
    from zoo.data.transforms import clip_transform
    from zoo.models.clip import ClipConfig

    sizes = ClipConfig.from_dict(config)
    return clip_transform(
        sizes.image.size, mean=sizes.mean, std=sizes.std, resize=sizes.resize, interpolation=sizes.interpolation
    )


def tokenizer(config: Config, files: Mapping[str, Path]) -> Any:
    """The tokenizer of the text tower, from the files that are there: merges.txt.gz (without it, OpenAI's are taken),
    or a BERT or XLM-R vocabulary.

    Raises DataError when there is none, WeightsMismatch when it has more ids than the weights.
    """
    from zoo.tokenizers import ClipTokenizer, TransformersTokenizer

    text = config["text"]
    if "pad" not in text:
        found = ClipTokenizer(files.get("merges.txt.gz"), text["context"])
    else:
        kind = "xlm-roberta" if text["bridge"] else "bert"
        vocabularies = (
            ("sentencepiece.bpe.model", "tokenizer.json") if text["bridge"] else ("vocab.txt", "tokenizer.json")
        )
        here = [files[name].parent for name in vocabularies if name in files]
        if not here:
            raise DataError(f"this model's tokenizer needs {' or '.join(vocabularies)} beside the weights")
        found = TransformersTokenizer.from_folder(here[0], kind, text["context"])
    if found.vocab_size != text["vocab"]:
        raise WeightsMismatch(
            f"the tokenizer has {found.vocab_size} ids and the weights have {text['vocab']}: put the vocabulary that "
            f"the model was trained with beside the weights, as merges.txt.gz for a CLIP"
        )
    return found


# --- sizes ---
HALF = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def vit(width: int, patch: int, size: int = 224, *, activation: str = "quick_gelu") -> dict[str, Any]:
    """The image towers of width 768 (B), 1024 (L) and 1280 (H)."""
    depth, heads = {768: (12, 12), 1024: (24, 16), 1280: (32, 16)}[width]
    return dict(size=size, patch=patch, width=width, depth=depth, heads=heads, activation=activation)


def resnet(width: int, size: int, layers: list[int]) -> dict[str, Any]:
    return dict(size=size, width=width, layers=layers)


def text(width: int, *, activation: str = "quick_gelu", depth: int = 12) -> dict[str, Any]:
    """OpenAI's text tower: heads of 64."""
    return dict(context=77, vocab=49408, width=width, depth=depth, heads=width // 64, activation=activation)


# --- rows ---
card = partial(Card, task="txt_img_matching", build=build, convert=convert, tokenizer=tokenizer, transform=transform)


def openai(name: str, file: str, sha256: str, megabytes: int, twin: str, **row: Any) -> Card:
    """A model of openai/CLIP. Its address holds its sha256; the twin holds the same weights in fp32, not pinned."""
    url = f"https://openaipublic.azureedge.net/clip/models/{sha256}/{file}"
    return card(
        name=name,
        family="clip",
        files=(File(name=file, url=url, sha256=sha256, size=megabytes << 20),),
        alternatives=(File(name="open_clip_model.safetensors", repo=f"timm/{twin}"),),
        licence="MIT; the model card asks for research use, not deployment",
        commercial=False,
        source="https://github.com/openai/CLIP",
        **row,
    )


def laion(name: str, repo: str, **row: Any) -> Card:
    """A model that LAION trained on LAION-2B with open_clip. Not pinned, so its config is fetched and compared too."""
    return card(
        name=name,
        family="clip",
        files=(File(name="open_clip_model.safetensors", repo=repo),),
        config_file=File(name="open_clip_config.json", repo=repo),
        alternatives=(File(name="open_clip_pytorch_model.bin", repo=repo),),
        licence="MIT",
        source=f"https://huggingface.co/{repo}",
        **row,
    )


def retrieval(data: str, t2i: float, i2t: float) -> dict[str, float]:
    """R@1, captions to pictures and pictures to captions."""
    return {f"{data}_t2i_r1": t2i, f"{data}_i2t_r1": i2t}


def english(imagenet: float, flickr: tuple[float, float], coco: tuple[float, float]) -> dict[str, float]:
    """Zero-shot ImageNet top-1, and retrieval on Flickr30k and COCO."""
    return {"imagenet_top1": imagenet} | retrieval("flickr30k", *flickr) | retrieval("coco", *coco)


B32, B16, L14, L14_336 = vit(768, 32), vit(768, 16), vit(1024, 14), vit(1024, 14, 336)
GELU = {"activation": "gelu"}

CARDS = (
    card(
        name="clip",
        family="clip",
        licence="that of the weights",
        languages=(),
        source="a CLIP of any size and layout, given as weights=",
    ),
    openai(
        "clip-base-p32-224",
        "ViT-B-32.pt",
        "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
        338,
        "vit_base_patch32_clip_224.openai",
        params=151_277_313,
        config=dict(embed=512, image=B32, text=text(512)),
        figures=english(63.32, (58.78, 78.90), (30.44, 50.12)),
    ),
    openai(
        "clip-base-p16-224",
        "ViT-B-16.pt",
        "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f",
        335,
        "vit_base_patch16_clip_224.openai",
        params=149_620_737,
        config=dict(embed=512, image=B16, text=text(512)),
        figures=english(68.34, (62.16, 82.20), (33.09, 52.42)),
    ),
    openai(
        "clip-large-p14-224",
        "ViT-L-14.pt",
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
        890,
        "vit_large_patch14_clip_224.openai",
        params=427_616_513,
        config=dict(embed=768, image=L14, text=text(768)),
        figures=english(75.54, (64.96, 85.20), (36.51, 56.34)),
    ),
    openai(
        "clip-large-p14-336",
        "ViT-L-14-336px.pt",
        "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02",
        891,
        "vit_large_patch14_clip_336.openai",
        params=427_944_193,
        config=dict(embed=768, image=L14_336, text=text(768)),
        figures=english(76.56, (66.90, 87.70), (37.09, 57.94)),
    ),
    openai(
        "clip-resnet50-224",
        "RN50.pt",
        "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762",
        244,
        "resnet50_clip.openai",
        params=102_007_137,
        config=dict(embed=1024, image=resnet(64, 224, [3, 4, 6, 3]), text=text(512)),
        figures=english(59.82, (57.36, 80.00), (28.54, 48.84)),
    ),
    openai(
        "clip-resnet101-224",
        "RN101.pt",
        "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599",
        278,
        "resnet101_clip.openai",
        params=119_688_033,
        config=dict(embed=512, image=resnet(64, 224, [3, 4, 23, 3]), text=text(512)),
        figures=english(62.28, (58.04, 79.00), (30.69, 49.82)),
    ),
    openai(
        "clip-resnet50x4-288",
        "RN50x4.pt",
        "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd",
        402,
        "resnet50x4_clip.openai",
        params=178_300_601,
        config=dict(embed=640, image=resnet(80, 288, [4, 6, 10, 6]), text=text(640)),
        figures=english(66.27, (62.58, 82.10), (33.39, 52.96)),
    ),
    openai(
        "clip-resnet50x16-384",
        "RN50x16.pt",
        "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa",
        630,
        "resnet50x16_clip.openai",
        params=290_979_217,
        config=dict(embed=768, image=resnet(96, 384, [6, 8, 18, 8]), text=text(768)),
        figures=english(70.72, (65.34, 85.70), (35.41, 55.36)),
    ),
    openai(
        "clip-resnet50x64-448",
        "RN50x64.pt",
        "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c",
        1290,
        "resnet50x64_clip.openai",
        params=623_258_305,
        config=dict(embed=1024, image=resnet(128, 448, [3, 15, 36, 10]), text=text(1024)),
        figures=english(73.91, (68.98, 86.90), (35.24, 58.42)),
    ),
    laion(
        "clip-base-p32-224-laion2b",
        "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
        params=151_277_313,
        config=dict(embed=512, image=B32 | GELU, text=text(512) | GELU),
        figures=english(66.6, (66.78, 84.10), (39.34, 56.32)),
    ),
    laion(
        "clip-base-p16-224-laion2b",
        "laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
        params=149_620_737,
        config=dict(embed=512, image=B16 | GELU, text=text(512) | GELU),
        figures={"imagenet_top1": 70.2},
    ),
    laion(
        "clip-large-p14-224-laion2b",
        "laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
        params=427_616_513,
        config=dict(embed=768, image=L14 | GELU, text=text(768) | GELU) | HALF,
        figures=english(75.3, (75.52, 89.50), (46.51, 63.36)),
    ),
    laion(
        "clip-huge-p14-224-laion2b",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        params=986_109_441,
        config=dict(embed=1024, image=vit(1280, 14) | GELU, text=text(1024) | GELU | {"depth": 24}),
        figures=english(78.0, (77.64, 90.70), (49.48, 65.92)),
    ),
)
