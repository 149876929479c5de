"""For `zoo plan`: what a family's training reads at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def clip_batch(model: Any, samples: int) -> dict[str, Any]:
    """Pictures without numbers, and captions that fill the context: the text tower looks where each ends.

    Two pairs at least: with one, a contrastive loss has nothing to contrast, though other processes may have some.
    """
    import torch

    samples = max(2, samples)
    tokens = torch.ones(samples, model.config.text.context, dtype=torch.int64)
    tokens[:, -1] = model.config.text.vocab - 1
    return {"image": torch.empty(samples, 3, model.image_size, model.image_size, device="meta"), "text": tokens}


def dalle_batch(model: Any, samples: int) -> dict[str, Any]:
    """Captions and codes, on meta: the dVAE is done, and its memory free, before the transformer begins."""
    import torch

    sizes = model.transformer.config
    shapes = {"text": (sizes.text_length,), "codes": (sizes.grid, sizes.grid)}
    return {name: torch.empty(samples, *shape, dtype=torch.int64, device="meta") for name, shape in shapes.items()}


def clip_gen_batch(model: Any, samples: int) -> dict[str, Any]:
    """Embeddings and codes, on meta, as from a cache: CLIP and the VQGAN are done before the transformer begins."""
    import torch

    sizes = model.transformer.config
    codes = torch.empty(samples, sizes.grid, sizes.grid, dtype=torch.int64, device="meta")
    return {"codes": codes, "embedding": torch.empty(samples, sizes.embed, device="meta")}


def stable_diffusion_batch(model: Any, samples: int) -> dict[str, Any]:
    """Tokens and moments, on meta: the VAE and the text tower are done before the UNet begins. One that inpaints looks
    at pictures itself."""
    import torch

    vae, size, side = model.vae, model.image_size, model.unet.config.size
    batch = {"text": torch.empty(samples, model.config.window, dtype=torch.int64, device="meta")}
    if model.inpaints:
        batch["image"] = torch.empty(samples, 3, size, size, device="meta")
        return batch | {"mask": torch.empty(samples, 1, size, size, device="meta")}
    return batch | {"moments": torch.empty(samples, 2 * vae.channels, side, side, device="meta")}


BATCHES: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "clip": clip_batch,
    "dalle": dalle_batch,
    "clip-gen": clip_gen_batch,
    "stable-diffusion": stable_diffusion_batch,
}
# Families whose training script builds the model with Trainer.build.
IN_PIECES = {"dalle", "clip-gen", "stable-diffusion"}
