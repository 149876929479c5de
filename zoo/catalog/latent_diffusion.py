"""The cards of latent diffusion's text-to-image models, from before Stable Diffusion: their text tower was trained
together with the UNet.

Sources: CompVis/latent-diffusion, README.md (addresses, samples, figures, licence of the code),
models/ldm/text2img256/config.yaml, configs/latent-diffusion/txt2img-1p4B-eval.yaml and scripts/txt2img.py. Of the
folder on the hub the names of its folders are known; that its files are .bin is not. No source states a hash.
"""

from __future__ import annotations

from zoo.catalog.kl_vae import F8
from zoo.catalog.stable_diffusion import BERT_FILES, CLIP_ENDS, CLIP_L, NOISE, UNET, card, hub
from zoo.catalog.vqgan import LDM, LDM_F4, LDM_FILES, LDM_LICENCE
from zoo.hub import File

ZIP = File(name="text2img.zip", url=LDM_FILES.format("text2img.zip"))
TOWER = {"context": 77, "vocab": 30522, "depth": 32, "heads": 8, "head_width": 64, "mlp_ratio": 4.0}
BERT_ENDS = {"start": 101, "end": 102, "pad": 0, "window": 77}
# Of text2img256, on latents of a quarter of a picture's side, whose three numbers are not scaled.
UNET_256 = UNET | {"channels": 3, "out": 3, "widths": (192, 384, 576, 960), "attention": (1, 2, 3)}
UNET_256 |= {"heads": (6, 12, 18, 30)}
VQ = LDM_F4 | {"vocab": 8192}
NOISE_256 = NOISE | {"beta_start": 0.0015, "beta_end": 0.0195}

CARDS = (
    # Trained on LAION, then on Conceptual Captions. Its FID there, 16.79, is of 100 steps of DDIM with eta 0; nothing
    # is said of guidance, so that there is none here.
    card(
        name="ldm-text2img-256",
        files=(
            File(name="model.ckpt", archive=ZIP),
            File(name="vocab.txt", repo="google-bert/bert-base-uncased"),
        ),
        config={
            "text": TOWER | {"width": 640},
            "unet": UNET_256 | {"context": 640},
            "vae": VQ,
            "noise": NOISE_256,
            **BERT_ENDS,
            **{"guidance": 1.0, "sampler": "ddim", "steps": 100},
        },
        params=625_536_801,
        licence=LDM_LICENCE,
        source=LDM,
    ),
    # Trained on LAION-400M, and drawn with, as the README and the script have it: guidance of 5, 50 steps of DDIM.
    hub(
        "ldm-text2im-large-256",
        "CompVis/ldm-text2im-large-256",
        {
            "text": TOWER | {"width": 1280},
            "unet": UNET | {"context": 1280, "size": 32},
            "vae": F8,
            "noise": NOISE,
            **BERT_ENDS,
            **{"guidance": 5.0, "sampler": "ddim", "steps": 50},
        },
        1_498_849_707,
        parts=("unet/diffusion_pytorch_model.bin", "vqvae/diffusion_pytorch_model.bin", "bert/pytorch_model.bin"),
        beside=BERT_FILES[:1],
        alternatives=(File(name="model.ckpt", url=LDM_FILES.format("nitro/txt2img-f8-large/model.ckpt")),),
        licence="Apache-2.0 (of the file that stands in for it: MIT, that of the code)",
    ),
    # High-Flyer's run on Conceptual Captions at 256 pixels: the sizes of text2img256, of which the context's width is
    # that of OpenAI's text tower instead of one of its own.
    card(
        name="ldm-cc256",
        config={
            "text": CLIP_L,
            "unet": UNET_256 | {"linear": True},
            "vae": VQ,
            "noise": NOISE_256,
            "pad": 49407,
            **CLIP_ENDS,
        },
        params=584_710_561,
        licence="that of the weights you train",
        languages=(),
        source="to train: examples/stable_diffusion_cc256.txt",
    ),
)
