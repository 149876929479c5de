"""The cards of Stable Diffusions that read other languages: AltDiffusion and Taiyi, whose text towers are their own.

Sources: FlagAI-Open/FlagAI, README of AltDiffusion; diffusers, alt_diffusion; IDEA-CCNL/Fengshenbang-LM. No source
states a hash, so that nothing is pinned. How long Taiyi's prompts are is what BERT holds; no source was reached.
"""

from __future__ import annotations

from zoo.catalog.stable_diffusion import BERT_FILES, PICKLED, UNET_2, V1, V1_PARAMS, XLMR_FILES, hub

XLMR = {"context": 77, "vocab": 250002, "width": 1024, "depth": 24, "heads": 16, "mlp_ratio": 4.0, "activation": "gelu"}
XLMR |= {"eps": 1e-5, "positions": 514, "first_position": 2, "types": 1, "pad": 1, "bridge": 768}
XLMR |= {"penultimate": False, "norm": False, "masked": True}
BERT = {"context": 512, "vocab": 21128, "width": 768, "depth": 12, "heads": 12, "mlp_ratio": 4.0, "activation": "gelu"}
BERT |= {"eps": 1e-12, "positions": 512, "first_position": 0, "types": 2, "pad": 0, "bridge": None}
BERT |= {"penultimate": False, "norm": False, "masked": False}
ALT = V1 | {"text": XLMR, "start": 0, "end": 2, "pad": 1}
ALT_M18 = ALT | {"text": XLMR | {"bridge": 1024, "penultimate": True, "norm": True}, "unet": UNET_2}
TAIYI = V1 | {"text": BERT, "start": 101, "end": 102, "pad": 0, "window": 512}

CARDS = (
    hub(
        "altdiffusion",
        "BAAI/AltDiffusion",
        ALT,
        1_502_802_859,
        parts=PICKLED,
        beside=XLMR_FILES[:1],
        languages=("zh", "en"),
    ),
    hub(
        "altdiffusion-m9",
        "BAAI/AltDiffusion-m9",
        ALT,
        1_502_802_859,
        parts=PICKLED,
        beside=XLMR_FILES[:1],
        languages=("en", "zh", "es", "fr", "ru", "ja", "ko", "ar", "it"),
    ),
    hub(
        "altdiffusion-m18",
        "BAAI/AltDiffusion-m18",
        ALT_M18,
        1_509_457_067,
        parts=PICKLED,
        beside=XLMR_FILES[:1],
        languages=(*"en zh ja th ko hi uk ar tr vi pl nl pt it es de fr ru".split(),),
    ),
    hub(
        "taiyi-stable-diffusion-1b-chinese-v0.1",
        "IDEA-CCNL/Taiyi-Stable-Diffusion-1B-Chinese-v0.1",
        TAIYI,
        1_044_851_883,
        parts=PICKLED,
        beside=BERT_FILES[:1],
        languages=("zh",),
    ),
    hub(
        "taiyi-stable-diffusion-1b-chinese-en-v0.1",
        "IDEA-CCNL/Taiyi-Stable-Diffusion-1B-Chinese-EN-v0.1",
        V1 | {"guidance": 10.0},
        V1_PARAMS,
        parts=PICKLED,
        beside=("tokenizer/merges.txt",),
        languages=("zh", "en"),
    ),
)
