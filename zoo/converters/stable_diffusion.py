"""Published weights of whole Stable Diffusions <-> ours. A state maps names to tensors; our config is what
StableDiffusionConfig takes.

Layouts:
    diffusers   a folder of folders: unet.*, vae.*, text_encoder.* as `weights.read` calls its tensors, and its configs
                below "diffusers", as `weights.read_config` does; latent diffusion's own has vqvae.* and bert.*
    CompVis     one file: model.diffusion_model.*, first_stage_model.*, cond_stage_model.*, the averages of the UNet as
                model_ema.*, and buffers of the noise; Stability AI's of version 2 and latent diffusion's too

Ours are the three parts of a StableDiffusion: text.*, unet.* and vae.*. To export a model for other programs:

    parts = stable_diffusion.to_diffusers(model.state_dict(), dataclasses.asdict(model.config))
    zoo.commands.export.save_diffusers(model, folder)        # the same, written with model_index.json and tokenizer
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zoo.converters import kl_vae, noise, text_encoder, unet, vqgan
from zoo.converters.modules import State, below, some, unwrapped
from zoo.errors import SettingsError, WeightsMismatch

log = logging.getLogger(__name__)

WRAPPERS = ("state_dict.", "module.")
PARTS = {  # what each is called by ours, diffusers and CompVis
    "text": ("text.", "text_encoder.", "bert.", "cond_stage_model."),
    "unet": ("unet.", "model.diffusion_model."),
    "vae": ("vae.", "vqvae.", "first_stage_model."),
}
FOLDERS = {"text": ("text_encoder", "bert"), "unet": ("unet",), "vae": ("vae", "vqvae")}
COMPVIS = "model.diffusion_model."
IGNORED = noise.BUFFERS | {"scale_factor", "logvar"}
DRAWING = ("caption_dropout", "min_snr", "noise_offset", "guidance", "rescale", "sampler", "steps")
NOISE = {
    **{"steps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "shape": "scaled_linear", "prediction": "epsilon"},
    **{"zero_snr": False, "offset": 1, "last_alpha_one": False},
}
V2_CONTEXT = 1024  # the width of OpenCLIP's tower; such UNets were published to predict the noise, and v


def to_ours(state: Mapping[str, Tensor], config: Mapping, *, ema: bool = True) -> tuple[State, dict[str, Any]]:
    """A state of any of these layouts (or ours), and what its files or its card say -> our state and config.

    Sizes come from shapes; what those cannot tell from the configs, see the converters of the parts. What the network
    predicts is said by the scheduler's config, the card or ours, and else the noise. `ema`: the averages of the UNet
    where a CompVis file has them, else the weights that training goes on with. What is not known keeps its name, so
    that strict loading reports it. Raises WeightsMismatch for weights of another kind, and without one of the parts.
    """
    state = unwrapped(state, WRAPPERS)
    theirs = config.get("diffusers", {})
    parts = {part: _part(state, part, ema) for part in PARTS}
    told = {part: _told(config.get(part), *(theirs.get(folder) for folder in FOLDERS[part])) for part in PARTS}
    told["text"] |= _window(theirs.get("tokenizer", {}))
    unet_state, unet_config = unet.to_ours(parts["unet"], told["unet"])
    text_state, text_config = text_encoder.to_ours(parts["text"], told["text"])
    vae_state, vae_config = _vae(parts["vae"], told["vae"], config.get("vae") or {}, state, unet_config["size"])
    ours = {f"text.{name}": tensor for name, tensor in text_state.items()}
    ours |= {f"unet.{name}": tensor for name, tensor in unet_state.items()}
    ours |= {f"vae.{name}": tensor for name, tensor in vae_state.items()}
    scheduler = theirs.get("scheduler", {})
    sampler = noise.SAMPLERS.get(scheduler.get("_class_name", ""))
    return ours | _beside(state), {
        "text": text_config,
        "unet": unet_config,
        "vae": vae_config,
        "noise": _noise(state, config, scheduler, unet_config),
        **_ends(config, text_config, theirs.get("tokenizer", {})),
        **({"sampler": sampler} if sampler else {}),
        **{name: config[name] for name in DRAWING if name in config},
    }


def _told(*configs: Mapping | None) -> dict[str, Any]:
    """What they say together, the last first."""
    return {name: value for config in configs for name, value in (config or {}).items()}


def _part(state: State, part: str, ema: bool) -> State:
    for prefix in PARTS[part]:
        found = unet.averaged(state, prefix) if prefix == COMPVIS and ema else below(state, prefix)
        if found:
            return found
    raise WeightsMismatch(
        f"these {some(state)} lack a part of a Stable Diffusion, the {part}: there is nothing named "
        f"{' or '.join(f'{prefix}*' for prefix in PARTS[part])}. Give the whole folder of diffusers, with unet, vae "
        "and text_encoder, the single file of CompVis, or zoo's own"
    )


def _beside(state: State) -> State:
    """What belongs to no part and is not known to be of no use."""
    prefixes = tuple(prefix for some in PARTS.values() for prefix in some)
    return {n: t for n, t in state.items() if not n.startswith((*prefixes, unet.AVERAGES)) and n not in IGNORED}


def _vae(part: State, told: Mapping, said: Mapping, state: State, side: int) -> tuple[State, dict[str, Any]]:
    """The first stage. Its pictures are as large as those of the UNet, whatever it was trained on itself."""
    told = {name: value for name, value in told.items() if name != "sample_size"}
    has_codes = "quantize.embedding.weight" in part
    vae, config = (vqgan if has_codes else kl_vae).to_ours(part, told)
    if "scale_factor" in state:
        factor = float(f"{float(state['scale_factor']):.5g}")
        scale = 1.0 if has_codes else said.get("scale", factor)
        if abs(scale / factor - 1) > 1e-3:  # as half precision rounds
            raise WeightsMismatch(
                f"the latents in this file were multiplied with {factor:g}, and those of this model with "
                f"{scale:g}: the UNet was trained with another autoencoder; load it by the family's name"
            )
        config |= {} if has_codes else {"scale": scale}
    if "size" not in said:
        config["size"] = side << (len(config["widths"]) - 1)
    return vae, config


def _noise(state: State, config: Mapping, scheduler: Mapping, unet_config: Mapping) -> dict[str, Any]:
    if scheduler:
        return noise.from_scheduler(scheduler)
    said = config.get("noise") or {}
    found = {**NOISE, **said}
    if "betas" in state and not found["zero_snr"]:
        found |= noise.from_betas(state["betas"])
    if "prediction" not in said and unet_config["context"] == V2_CONTEXT:
        log.warning(
            "nothing beside these weights says what the network predicts, and those of version 2 were published both "
            "ways: taking the noise, epsilon. If pictures are grey or noise, load them by the card's name, such as "
            "stable-diffusion-2-1, or from a folder with a scheduler"
        )
    return found


def _window(tokenizer: Mapping) -> dict[str, int]:
    """How long prompts are, where a tokenizer's files say it; transformers writes a huge number where none is known."""
    length = tokenizer.get("model_max_length", 0)
    return {"context": length} if 2 < length < 100_000 else {}


def _ends(config: Mapping, text: Mapping, tokenizer: Mapping) -> dict[str, int]:
    """The ids around a prompt, and its length. OpenAI's tower was trained on prompts padded with the end token,
    OpenCLIP's with 0, of which the files of version 2 say both: there special_tokens_map.json comes first."""
    if ends := text_encoder.tower_of(text).ends:
        found = {**ends, "pad": text.get("pad", config.get("pad", ends["pad"]))}
    else:
        end = text["vocab"] - 1
        pads = {"!": 0, "<|endoftext|>": end}
        pad = tokenizer.get("pad_token")
        pad = pad.get("content") if isinstance(pad, Mapping) else pad
        usual = end if text["activation"] == "quick_gelu" else 0
        found = {"start": end - 1, "end": end, "pad": pads.get(pad, config.get("pad", usual))}
    found = {name: config.get(name, value) if name != "pad" else value for name, value in found.items()}
    return {**found, "window": config.get("window", text["context"])}


# --- writing ---------------------------------------------------------------------------------------------------------
def to_diffusers(state: Mapping[str, Tensor], config: Mapping) -> dict[str, Any]:
    """Our state and config -> what a folder of diffusers holds: "unet", "vae" and "text_encoder", each its state and
    its config.json, and "scheduler", its scheduler_config.json. Raises WeightsMismatch for what has no place there."""
    if "vocab" in config["vae"]:
        raise WeightsMismatch(
            "diffusers' folder has no place for a VQ first stage: hand this model on as CompVis's single file"
        )
    if text_encoder.tower_of(config["text"]) is text_encoder.LDM_BERT:
        raise WeightsMismatch(
            "diffusers has another pipeline for latent diffusion's text tower, LDMTextToImagePipeline, and zoo does "
            "not write its folder: hand this model on as CompVis's single file"
        )
    return {
        "unet": unet.to_diffusers(below(state, "unet."), config["unet"]),
        "vae": kl_vae.to_diffusers(below(state, "vae."), config["vae"]),
        "text_encoder": text_encoder.to_transformers(below(state, "text."), config["text"]),
        "scheduler": noise.to_scheduler(config["noise"], config["sampler"]),
    }


def to_compvis(state: Mapping[str, Tensor], config: Mapping, ema: Mapping[str, Tensor] | None = None) -> State:
    """Our state and config -> one CompVis file, as below "state_dict" there. `ema`: our state of averages, of which the
    UNet's are written beside. Such a file has no place for what the network predicts: say it where it is loaded.

    What is never used is not there: a block and a projection of version 2, the head of latent diffusion's tower.
    Raises WeightsMismatch for what CompVis's networks do not have.
    """
    if config["noise"]["shape"] == "cosine" or config["noise"]["zero_snr"]:
        raise SettingsError("CompVis's files have no place for this noise schedule: hand it on as diffusers' folder")
    theirs = _below(COMPVIS, unet.to_compvis(below(state, "unet."), config["unet"]))
    if ema is not None:
        averages = unet.to_compvis(below(ema, "unet."), config["unet"])
        root = COMPVIS.removeprefix("model.")
        theirs |= {unet.AVERAGES + (root + name).replace(".", ""): tensor for name, tensor in averages.items()}
    first = below(state, "vae.")
    first = vqgan.to_taming(first, config["vae"]) if "vocab" in config["vae"] else first
    theirs |= _below("first_stage_model.", first)
    theirs |= _below("cond_stage_model.", text_encoder.to_compvis(below(state, "text."), config["text"]))
    betas = noise.betas_of(config["noise"])
    return theirs | {"betas": betas.float(), "alphas_cumprod": (1 - betas).cumprod(0).float()}


def _below(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}
