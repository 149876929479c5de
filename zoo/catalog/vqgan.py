"""The cards of VQGANs as image tokenizers.

Sources: CompVis/taming-transformers, README.md (addresses, licence) and its configs; CompVis/latent-diffusion,
README.md and configs; ai-forever/ru-dalle, rudalle/vae; HFAiLab/clip-gen, its release v0.1.0 and models/; the model
card of DALL-E mini's port. No source states a hash, so that nothing is pinned; sizes in bytes are about.
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

    from zoo.data.transforms import UnitTransform
    from zoo.models.vqgan import Vqgan


# --- what the rows refer to ---
def build(config: Config) -> Vqgan:
    """A VQGAN of these sizes. Raises WeightsMismatch for a config with fields that zoo does not know."""
    from zoo.models.vqgan import Vqgan, VqganConfig

    try:
        sizes = VqganConfig.from_dict(config)
    except TypeError as error:
        raise WeightsMismatch(f"the config is not one of a VQGAN of this version of zoo: {error}") from error
    return Vqgan(sizes)


def convert(state: Mapping[str, Tensor], config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Any published layout -> ours, see zoo/converters/vqgan.py."""
    from zoo.converters.vqgan import to_ours

    return to_ours(state, config)


def transform(config: Config) -> UnitTransform:
    """PIL picture -> tensor (3, size, size) of 0..1, as taming's notebook of reconstructions does it."""
    from zoo.data.transforms import unit_transform

    return unit_transform(config["size"])


# --- rows ---
SIZES = {"size": 256, "blocks": 2, "latent": 256, "code_width": 256, "black": -1.0, "encoder": True, "haar": False}
SIZES |= {"eps": 1e-6, "groups": 32, "codebook": 0.25, "commitment": 1.0, "decay": 0.0, "restart": 0.0}
F16 = SIZES | {"widths": (128, 128, 256, 256, 512), "attention": (4,), "quantizer": "vq"}
F8 = SIZES | {"widths": (128, 128, 256, 512), "attention": (3,), "quantizer": "gumbel", "vocab": 8192}
COCO = F16 | {"vocab": 16384, "eps": 1e-5, "codebook": 0.2}
LDM_F4 = SIZES | {"widths": (128, 256, 512), "attention": (), "quantizer": "vq", "latent": 3, "code_width": 3}
LDM_F8 = SIZES | {"widths": (128, 256, 256, 512), "attention": (3,), "quantizer": "vq", "latent": 4, "code_width": 4}
TAMING, RUDALLE = "https://github.com/CompVis/taming-transformers", "https://github.com/ai-forever/ru-dalle"
LDM, LDM_FILES = "https://github.com/CompVis/latent-diffusion", "https://ommer-lab.com/files/latent-diffusion/{}"
CLIP_GEN = "https://github.com/HFAiLab/clip-gen"
HEIBOX = "https://heibox.uni-heidelberg.de/f/{}/?dl=1"
SBER = "vqgan.gumbelf8-sber.model.ckpt"
SBER_LICENCE = "Apache-2.0 (that of the code; none is stated for the weights)"
LDM_LICENCE = "MIT (that of the code; none is stated for the weights)"
card = partial(
    Card, task="img_tokenizing", family="vqgan", build=build, convert=convert, transform=transform, languages=()
)

CARDS = (
    card(
        name="vqgan-emoji-tiny",
        files=(
            File(
                name="model.safetensors",
                packaged="vqgan-emoji-tiny/model.safetensors",
                sha256="e5bbeb6ac6d3e0c7237ab80cd323792b4b5b5373f0fd1ad8236c47193b44c46a",
                size=4_079_372,
            ),
        ),
        params=2_019_107,
        licence="Apache-2.0",
        source="examples/train_vqgan.py; what it learnt from: zoo/assets/LICENSES",
        trained="from nothing on the pictures of the emoji training split, 2,500 steps of 8, 15 minutes "
        "on two CPU cores: python examples/train_vqgan.py --steps 2500 --batch-size 8 --lr 1.5e-3 --precision bf16 "
        "--lpips lpips-vgg16 --perceptual-share 0.25 --code-width 32 --decay 0.98 --restart 0.05 --disc-start 0.6 "
        "--adversarial 0.2 --ema 0.998; the average of its weights, kernels in half precision. Of the test split: "
        "zoo eval dvae --model vqgan-emoji-tiny --lpips lpips-vgg16",
        figures={
            "emoji_test_psnr": 17.92,
            "emoji_test_lpips": 0.269,
            "emoji_test_code_usage": 1.0,
            "emoji_test_code_perplexity": 897.0,
        },
    ),
    card(
        name="vqgan",
        licence="that of the weights",
        source="a VQGAN of any size and published layout, or of zoo, given as weights=",
    ),
    card(
        name="vqgan-imagenet-f16-1024",
        files=(File(name="last.ckpt", url=HEIBOX.format("140747ba53464f49b476")),),
        config=F16 | {"vocab": 1024},
        params=72_141_699,
        licence="MIT",
        source=TAMING,
    ),
    card(
        name="vqgan-imagenet-f16-16384",
        files=(File(name="last.ckpt", url=HEIBOX.format("867b05fc8c4841768640")),),
        config=F16 | {"vocab": 16384},
        params=76_073_859,
        licence="MIT",
        source=TAMING,
    ),
    card(
        name="vqgan-openimages-gumbel-f8",
        files=(File(name="last.ckpt", url=HEIBOX.format("34a747d5765840b5a99d")),),
        config=F8,
        params=68_995_971,
        licence="MIT",
        source=TAMING,
    ),
    card(
        name="vqgan-sber-gumbel-f8",
        files=(File(name=SBER, repo="ai-forever/rudalle-utils", size=346_000_000),),
        alternatives=(File(name=SBER, repo="ai-forever/Sber-VQGAN", size=346_000_000),),
        config=F8,
        params=68_995_971,
        licence=SBER_LICENCE,
        source=RUDALLE,
    ),
    card(
        name="vqgan-sber-gumbel-f8-dwt",  # takes pictures of 256 pixels, gives pictures of 512
        files=(File(name="vqgan.gumbelf8-sber-dwt.model.ckpt", repo="ai-forever/rudalle-utils", size=276_000_000),),
        config=F8 | {"haar": True},
        params=69_006_348,
        licence=SBER_LICENCE,
        source=RUDALLE,
    ),
    # patil-suraj/vqgan-jax ran all attentions of a level after each of its blocks until July 2022 (8acc6b7, caafeee),
    # perhaps when DALL-E mini's codes were made. Here each follows its own block, as mended there and in min-dalle.
    card(
        name="vqgan-dalle-mini",
        files=(File(name="flax_model.msgpack", repo="dalle-mini/vqgan_imagenet_f16_16384", size=304_000_000),),
        config=F16 | {"vocab": 16384, "black": 0.0},
        params=76_073_859,
        licence="Apache-2.0 (a port of taming's of ImageNet, MIT)",
        source="https://huggingface.co/dalle-mini/vqgan_imagenet_f16_16384",
    ),
    card(
        name="vqgan-coco",
        files=(File(name="vqgan_coco.pt", url=f"{CLIP_GEN}/releases/download/v0.1.0/vqgan_coco.pt"),),
        config=COCO,
        params=76_073_859,
        licence="MIT",
        source=CLIP_GEN,
    ),
    # latent-diffusion's first stages, trained on OpenImages. That of its vq-f4-noattn has no attention in the middle
    # either, which no layout here can say.
    card(
        name="vq-f4",
        files=(File(name="model.ckpt", archive=File(name="vq-f4.zip", url=LDM_FILES.format("vq-f4.zip"))),),
        config=LDM_F4 | {"vocab": 8192},
        params=55_322_782,
        licence=LDM_LICENCE,
        source=LDM,
    ),
    card(
        name="vq-f8",
        files=(File(name="model.ckpt", archive=File(name="vq-f8.zip", url=LDM_FILES.format("vq-f8.zip"))),),
        config=LDM_F8 | {"vocab": 16384},
        params=67_717_295,
        licence=LDM_LICENCE,
        source=LDM,
    ),
    card(
        name="vq-f8-n256",
        files=(File(name="model.ckpt", archive=File(name="vq-f8-n256.zip", url=LDM_FILES.format("vq-f8-n256.zip"))),),
        config=LDM_F8 | {"vocab": 256},
        params=67_652_783,
        licence=LDM_LICENCE,
        source=LDM,
    ),
)
