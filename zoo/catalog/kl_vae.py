"""The cards of KL-VAEs, the first stages of latent diffusion.

Sources: CompVis/latent-diffusion, README.md (addresses, licence) and models/first_stage_models/*/config.yaml;
CompVis/stable-diffusion. Its files' hashes are those of their LFS pointers; of the others no source states one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from zoo.catalog.card import Card, Config
from zoo.catalog.vqgan import LDM, LDM_FILES, LDM_LICENCE
from zoo.errors import WeightsMismatch
from zoo.hub import File

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.data.transforms import UnitTransform
    from zoo.models.kl_vae import KlVae


# --- what the rows refer to ---
def build(config: Config) -> KlVae:
    """A KL-VAE of these sizes. Raises WeightsMismatch for a config with fields that zoo does not know."""
    from zoo.models.kl_vae import KlVae, KlVaeConfig

    try:
        sizes = KlVaeConfig.from_dict(config)
    except TypeError as error:
        raise WeightsMismatch(f"the config is not one of a KL-VAE of this version of zoo: {error}") from error
    return KlVae(sizes)


def convert(state: Mapping[str, Tensor], config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Any published layout -> ours, see zoo/converters/kl_vae.py."""
    from zoo.converters.kl_vae import to_ours

    return to_ours(state, config)


def transform(config: Config) -> UnitTransform:
    """PIL picture -> tensor (3, size, size) of 0..1; the model turns it to -1..1 itself."""
    from zoo.data.transforms import unit_transform

    return unit_transform(config["size"])


# --- rows ---
SIZES = {"size": 256, "blocks": 2, "attention": (), "eps": 1e-6, "groups": 32, "quant": True, "kl_weight": 1e-6}
F8 = SIZES | {"widths": (128, 256, 512, 512), "latent": 4, "scale": 0.18215}
# What its latents are multiplied with is measured by each diffusion model that is trained on them.
BARE = SIZES | {"scale": 1.0}
STABLE_DIFFUSION = F8 | {"size": 512}
V1_FILE = {
    "sha256": "a2b5134f4dbc140d9c11f11cba3233099e00af40f262f136c691fb7d38d2194c",
    "size": 334_643_276,
}
card = partial(
    Card, task="img_tokenizing", family="kl-vae", build=build, convert=convert, transform=transform, languages=()
)


def ldm(name: str, config: Config, params: int) -> Card:
    """A first stage of latent-diffusion, trained on OpenImages."""
    archive = File(name=f"{name}.zip", url=LDM_FILES.format(f"{name}.zip"))
    return card(
        name=name,
        files=(File(name="model.ckpt", archive=archive),),
        config=config,
        params=params,
        licence=LDM_LICENCE,
        source=LDM,
    )


CARDS = (
    card(
        name="kl-vae-emoji-tiny",
        files=(
            File(
                name="model.safetensors",
                packaged="kl-vae-emoji-tiny/model.safetensors",
                sha256="2c33be776fe6fb965b5235042e4b10611f45fb9f49a772cc2d5531e5feb4ab4e",
                size=3_420_988,
            ),
        ),
        config=SIZES
        | {"size": 64, "widths": (32, 64, 96), "blocks": 1, "latent": 4, "groups": 4}
        | {"scale": 0.49645, "kl_weight": 0.01},
        params=1_695_271,
        licence="Apache-2.0",
        source="examples/train_kl_vae.py; what it learnt from: zoo/assets/LICENSES",
        trained="from nothing on the pictures of the emoji training split, 2,000 steps of 8, 23 minutes on one core: "
        "python examples/train_kl_vae.py --steps 2000 --batch-size 8 --lr 1.5e-3 --precision bf16 --lpips lpips-vgg16 "
        "--perceptual-share 0.25 --kl-weight 0.01 --disc-start 0.6 --adversarial 0.2 --ema 0.998; the average of its "
        "weights, kernels in half precision. Of the test split: zoo eval dvae --model kl-vae-emoji-tiny --lpips "
        "lpips-vgg16",
        figures={"emoji_test_psnr": 20.82, "emoji_test_lpips": 0.143},
    ),
    card(
        name="kl-vae",
        licence="that of the weights",
        source="a KL-VAE of any size, as CompVis, diffusers or zoo wrote it, given as weights=",
    ),
    card(
        name="stable-diffusion-vae",  # of versions 1-1 to 1-5
        files=(
            File(
                name="diffusion_pytorch_model.safetensors",
                repo="stable-diffusion-v1-5/stable-diffusion-v1-5",
                path="vae/diffusion_pytorch_model.safetensors",
                **V1_FILE,
            ),
        ),
        alternatives=(
            File(
                name="vae/diffusion_pytorch_model.safetensors",
                repo="CompVis/stable-diffusion-v1-4",
                **V1_FILE,
            ),
        ),
        config=STABLE_DIFFUSION,
        params=83_653_863,
        licence="CreativeML OpenRAIL-M",
        source="https://github.com/CompVis/stable-diffusion",
    ),
    ldm("kl-f4", BARE | {"widths": (128, 256, 512), "latent": 3}, 55_312_063),
    ldm("kl-f8", F8, 83_653_863),
    ldm("kl-f16", BARE | {"widths": (128, 128, 256, 256, 512), "attention": (4,), "latent": 16}, 69_610_963),
    ldm("kl-f32", BARE | {"widths": (128, 128, 256, 256, 512, 512), "attention": (4, 5), "latent": 64}, 103_880_131),
)
