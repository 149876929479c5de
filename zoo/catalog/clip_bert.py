"""The cards of Chinese-CLIP and AltCLIP: CLIPs whose text tower is a BERT.

Figures, sizes and hashes: OFA-Sys/Chinese-CLIP, README.md, Results.md and cn_clip/clip/model_configs/;
FlagAI-Open/FlagAI, examples/AltCLIP*/README.md. A file without sha256 is one whose hash no source states: not pinned.
"""

from __future__ import annotations

from typing import Any

from zoo.catalog.card import Card
from zoo.catalog.clip import B16, L14, L14_336, card, resnet, retrieval, vit
from zoo.hub import File

SQUASH = {"resize": "squash"}


def bert(width: int, depth: int, heads: int) -> dict[str, Any]:
    """Chinese-CLIP's text tower."""
    sizes = dict(context=52, vocab=21128, positions=512, types=2, pad=0, first_position=0, eps=1e-12, bridge=None)
    return sizes | dict(width=width, depth=depth, heads=heads, activation="gelu")


def xlm_roberta(bridge: int) -> dict[str, Any]:
    """AltCLIP's text tower, XLM-RoBERTa large."""
    sizes = dict(context=77, vocab=250002, positions=514, types=1, pad=1, first_position=2, eps=1e-5, bridge=bridge)
    return sizes | dict(width=1024, depth=24, heads=16, activation="gelu")


def chinese(name: str, repo: str, file: str, sha256: str | None, size: int | None, **row: Any) -> Card:
    """A model of OFA-Sys/Chinese-CLIP. Its five models share one vocabulary."""
    url = f"https://clip-cn-beijing.oss-cn-beijing.aliyuncs.com/checkpoints/{file}"
    vocabulary = File(name="vocab.txt", repo="OFA-Sys/chinese-clip-vit-base-patch16")
    return card(
        name=name,
        family="clip",
        files=(File(name=file, url=url, repo=f"OFA-Sys/{repo}", sha256=sha256, size=size), vocabulary),
        licence="MIT",
        languages=("zh",),
        source="https://github.com/OFA-Sys/Chinese-CLIP",
        **row,
    )


def altclip(name: str, repo: str, sha256: str | None, size: int, **row: Any) -> Card:
    """A model of BAAI. transformers' conversion holds the weights, XLM-R's vocabulary lies beside them."""
    return card(
        name=name,
        family="clip",
        files=(
            File(name="pytorch_model.bin", repo=repo, sha256=sha256, size=size),
            File(name="sentencepiece.bpe.model", repo=repo),
        ),
        config_file=File(name="config.json", repo=repo),
        licence="CreativeML Open RAIL-M",
        source="https://github.com/FlagAI-Open/FlagAI/tree/master/examples/AltCLIP",
        **row,
    )


def in_chinese(
    imagenet: float, flickr: tuple[float, float], coco: tuple[float, float], muge: float
) -> dict[str, float]:
    """The same on the Chinese sets, and MUGE, captions to pictures."""
    pairs = retrieval("flickr30k_cn", *flickr) | retrieval("coco_cn", *coco)
    return {"imagenet_cn_top1": imagenet, "muge_t2i_r1": muge} | pairs


CARDS = (
    chinese(
        "chinese-clip-rn50",
        "chinese-clip-rn50",
        "clip_cn_rn50.pt",
        None,
        None,
        params=76_989_537,
        config=dict(embed=1024, image=resnet(64, 224, [3, 4, 6, 3]), text=bert(768, 3, 12)) | SQUASH,
        figures=in_chinese(33.5, (48.8, 60.0), (48.1, 51.6), 42.6),
    ),
    chinese(
        "chinese-clip-vit-base-p16",
        "chinese-clip-vit-base-patch16",
        "clip_cn_vit-b-16.pt",
        "5997ef32c50de18f3ac06eb5d746c324a639053c3bed8f2986f97ebb22b2ecde",
        753_000_000,
        params=188_262_913,
        config=dict(embed=512, image=B16, text=bert(768, 12, 12)) | SQUASH,
        figures=in_chinese(48.3, (62.7, 74.6), (62.2, 57.0), 52.1),
    ),
    chinese(
        "chinese-clip-vit-large-p14",
        "chinese-clip-vit-large-patch14",
        "clip_cn_vit-l-14.pt",
        "26a0d4ac248fcea33e8c1e32c22a80def0fe9b1770b429129dfcc04bcd978d28",
        1_625_135_766,
        params=406_233_089,
        config=dict(embed=768, image=L14, text=bert(768, 12, 12)) | SQUASH,
        figures=in_chinese(54.7, (68.0, 80.2), (64.0, 60.4), 56.3),
    ),
    chinese(
        "chinese-clip-vit-large-p14-336",
        "chinese-clip-vit-large-patch14-336px",
        "clip_cn_vit-l-14-336.pt",
        "53b9a3141f14b2e87366b0857ce78ac1c4c99e028d4d3d832ca8107deae0775b",
        1_626_446_358,
        params=406_560_769,
        config=dict(embed=768, image=L14_336, text=bert(768, 12, 12)) | SQUASH,
        figures=in_chinese(56.7, (69.0, 83.3), (64.7, 63.4), 59.0),
    ),
    chinese(
        "chinese-clip-vit-huge-p14",
        "chinese-clip-vit-huge-patch14",
        "clip_cn_vit-h-14.pt",
        "4549b1a9775db38806dfa398e8e97be4e27299b84b71250d8d2ef0472e708aee",
        3_830_716_726,
        params=957_598_209,
        config=dict(embed=1024, image=vit(1280, 14), text=bert(1024, 24, 16)) | SQUASH,
        figures=in_chinese(59.6, (71.2, 81.6), (69.2, 63.0), 63.0),
    ),
    altclip(
        "altclip-xlmr-l",
        "BAAI/AltCLIP",
        "0102cd1b26b61103dc89068d15cf02682f7bbd910e1ea99939f2bfc8c6772ebe",
        3_460_000_000,
        params=864_186_113,
        config=dict(embed=768, image=L14, text=xlm_roberta(768)),
        languages=("en", "zh"),
        figures=retrieval("flickr30k", 72.5, 86.0) | retrieval("flickr30k_cn", 69.8, 84.8),
    ),
    altclip(
        "altclip-xlmr-l-m9",
        "BAAI/AltCLIP-m9",
        None,
        3_460_000_000,
        params=864_186_113,
        config=dict(embed=768, image=L14, text=xlm_roberta(768)),
        languages=("en", "zh", "es", "fr", "ru", "ar", "ja", "ko", "it"),
    ),
    # No source states m18's image tower. Its size follows from that of the file: 4.78 GB less XLM-R is a ViT-H/14 in
    # fp32. Heads and activation are left to its config.json.
    altclip(
        "altclip-xlmr-l-m18",
        "BAAI/AltCLIP-m18",
        "16f1e0d4c281e1c3e5690b44042b1520b2e259b23b8f1e4f23f22602bb1b0494",
        4_780_000_000,
        params=1_193_017_857,
        config=dict(embed=1024, image=dict(size=224, patch=14, width=1280, depth=32), text=xlm_roberta(1024)),
        languages=tuple("en zh ja th ko hi uk ar tr vi pl nl pt it es de fr ru".split()),
        figures=retrieval("flickr30k", 77.76, 91.1) | retrieval("flickr30k_cn", 74.46, 87.9),
    ),
)
