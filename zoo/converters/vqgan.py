"""Published weights of VQGAN -> ours. A state maps names to tensors; our config is what VqganConfig takes.

Five layouts:
    CompVis/taming-transformers   state_dict.encoder.down.0.block.0.conv1.weight and so on, with the discriminator and
                                  LPIPS below loss.; minDALL-E's stage 1 and ruDALL-E's Gumbel VQGAN are stored so too,
                                  and CompVis/latent-diffusion's VQ first stages, below first_stage_model. in the
                                  checkpoint of a whole diffusion model
    ai-forever/ru-dalle, dwt      the same below model., whose decoder holds a decoder, its own post_quant_conv and the
                                  filters of the wavelet; the outer post_quant_conv is never used there
    kuprel/min-dalle              detoker.pt: embedding.weight, post_quant_conv, decoder
    patil-suraj/vqgan-jax         DALL-E mini's, flax: encoder/down_0/block_0/conv1/kernel, its axes in flax's order
    HFAiLab/clip-gen              model.encoder.down.0.block.2.weight: each half a chain of blocks, attentions and
                                  resizings in one numbering, q, k and v in one matrix, and the discriminator beside it

Ours are taming's names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from zoo.errors import SettingsError, WeightsMismatch

State = dict[str, Tensor]

SIZE = 256  # pixels; shapes cannot tell it, since the network takes any size
WRAPPERS = ("state_dict.", "module.", "first_stage_model.", "model.", "params/")  # in order
UNUSED = ("loss.", "decoder.idwt.")
FLAX = (  # in order
    (re.compile(r"/"), "."),
    (re.compile(r"\.(kernel|scale|embedding)$"), ".weight"),
    (re.compile(r"\b(down|up)_(\d+)\."), r"\1.\2."),
    (re.compile(r"(?<!\bmid\.)\b(block|attn)_(\d+)\."), r"\1.\2."),
)
BOOKS = {"quantize.embedding.weight": ("vq", "cosine"), "quantize.embed.weight": ("gumbel",)}
# What no shape tells. The loss of all published runs weighs its two terms the wrong way round, taming's with its
# beta=0.25 (taming/modules/vqvae/quantize.py, legacy), CLIP-GEN's with 0.2 (models/quantizer.py).
SAID = {"eps": 1e-6, "groups": 32, "codebook": 0.25, "commitment": 1.0, "decay": 0.0, "restart": 0.0}
TRAINED = ("quantize.counts", "quantize.sums")  # what zoo's training alone needs
TAMINGS = {
    "eps": 1e-6,
    "groups": 32,
    "black": -1.0,
    "encoder": True,
    "haar": False,
}  # its network cannot be told otherwise
MARKS = ("decoder.conv_in.weight", "decoder.conv_out.weight", "decoder.up.0.block.0.conv1.weight")


def to_ours(state: Mapping[str, Tensor], config: Mapping) -> tuple[State, dict[str, Any]]:
    """A state of any of these layouts (or ours), and what its files or its card say -> our state and config.

    Sizes come from shapes, and from `config` what shapes cannot tell: the pictures' side, as `size`, or as `resolution`
    in DALL-E mini's config.json; a "cosine" quantizer; `black`, which is 0 in DALL-E mini's and min-dalle's files and
    else -1, `eps`, `groups`, and how the quantizer is trained, unless they are those of the published runs. CLIP-GEN's
    layout has its own `eps` whatever `config` says, so that a card of other weights is found out.
    What is not known keeps its name, so that strict loading reports it.
    Raises WeightsMismatch for weights of another kind.
    """
    state = _unwrapped(state)
    said, fixed = SAID, {}
    if CLIP_GEN in state:
        state, said, fixed = _from_clip_gen(state), SAID | {"codebook": 0.2}, {"eps": 1e-5}
    # DALL-E mini gave its VQGAN pixels of 0..1 (tools/dataset/encode_dataset.ipynb), though it was trained on -1..1.
    black = 0.0 if "embedding.weight" in state or any("/" in name for name in state) else -1.0
    state = _renamed(state)
    books = [name for name in BOOKS if name in state]
    if len(books) != 1 or "post_quant_conv.weight" not in state or any(name not in state for name in MARKS):
        some = ", ".join(sorted(state)[:3]) or "none"
        raise WeightsMismatch(
            f"these {len(state)} tensors ({some}, ...) are not a VQGAN as taming-transformers, latent-diffusion, "
            "minDALL-E, ruDALL-E, DALL-E mini, min-dalle or CLIP-GEN published it, nor zoo's own. Check that the file "
            "is of the model that was asked for, and that it holds the image tokenizer and not the transformer"
        )
    return state, _config(state, books[0], {**said, "black": black, **config, **fixed})


def to_taming(state: Mapping[str, Tensor], config: Mapping) -> State:
    """A state of any of these layouts (or ours) and its config -> taming's, as below "state_dict" in its files.

    It holds the network alone, without loss. A "cosine" becomes a "vq" whose rows have length 1, which gives the same
    codes. CLIP-GEN's release is refused for its eps; `to_ours` gives its tensors under the same names.
    Raises SettingsError for a config that taming's network cannot be told, and as `to_ours`.
    """
    state, config = to_ours(state, config)
    if others := [f"{name}={config[name]}" for name, value in TAMINGS.items() if config[name] != value]:
        raise SettingsError(
            f"taming-transformers cannot be told {', '.join(others)}: its network has "
            f"{', '.join(f'{name}={value}' for name, value in TAMINGS.items())}, and would draw other pictures from "
            "these weights, or none. Hand them on in zoo's own layout, with their config.json"
        )
    if config["quantizer"] == "cosine":  # of rows of length 1 the nearest is that of the nearest direction
        state |= {name: F.normalize(state[name], dim=1) for name in BOOKS if name in state}
    return {name: tensor for name, tensor in state.items() if name not in TRAINED}


def _unwrapped(state: Mapping[str, Tensor]) -> State:
    for wrapper in WRAPPERS:
        inner = {name.removeprefix(wrapper): t for name, t in state.items() if name.startswith(wrapper)}
        state = inner or state
    return dict(state)


def _renamed(state: State) -> State:
    if any("/" in name for name in state):
        state = {_spelled(name): _from_flax(name, tensor) for name, tensor in state.items()}
    if any(name.startswith("decoder.decoder.") for name in state):
        state = {name: tensor for name, tensor in state.items() if not name.startswith("post_quant_conv.")}
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r"^decoder\.(decoder|post_quant_conv)\.", r"\1.", name)
        name = "quantize.embedding.weight" if name == "embedding.weight" else name
        if not name.startswith(UNUSED):
            renamed[name] = tensor
    return renamed


def _spelled(name: str) -> str:
    for pattern, ours in FLAX:
        name = pattern.sub(ours, name)
    return name


def _from_flax(name: str, tensor: Tensor) -> Tensor:
    if name.endswith("/kernel") and tensor.ndim == 4:
        return tensor.permute(3, 2, 0, 1).contiguous()  # height, width, in, out -> out, in, height, width
    return tensor if name.endswith("/embedding") else tensor.flatten()  # of norms, (1, 1, 1, C) before flax 0.3.6


def _config(state: State, book: str, config: Mapping) -> dict[str, Any]:
    levels = _count(state, r"decoder\.up\.(\d+)\.")
    firsts = [state.get(f"decoder.up.{level}.block.0.conv1.weight") for level in range(levels)]
    if any(first is None for first in firsts):
        raise WeightsMismatch("the decoder of this VQGAN lacks a level; fetch the file again")
    vocab, code_width = state[book].shape
    return {
        "size": config.get("resolution", config.get("size", SIZE)),
        "widths": tuple(first.shape[0] for first in firsts),
        "blocks": _count(state, r"decoder\.up\.0\.block\.(\d+)\.") - 1,
        "attention": tuple(level for level in range(levels) if f"decoder.up.{level}.attn.0.norm.weight" in state),
        "latent": state["post_quant_conv.weight"].shape[0],
        "vocab": vocab,
        "code_width": code_width,
        "quantizer": config["quantizer"] if config.get("quantizer") in BOOKS[book] else BOOKS[book][0],
        "black": config["black"],
        **{name: config[name] for name in SAID},
        "encoder": any(name.startswith("encoder.") for name in state),
        "haar": state["decoder.conv_out.weight"].shape[0] == 12,
    }


def _count(state: State, pattern: str) -> int:
    """One more than the largest number that the names hold at the pattern's place."""
    return max((int(found[1]) + 1 for name in state if (found := re.match(pattern, name))), default=0)


# --- CLIP-GEN's -------------------------------------------------------------------------------------------------------
CLIP_GEN = "quantizer.embedding.weight"  # no other layout has it
MODULES = {
    "encoder.mid.0": "encoder.mid.block_1",
    "encoder.mid.1": "encoder.mid.attn_1",
    "encoder.mid.2": "encoder.mid.block_2",
    "encoder.final.0": "encoder.norm_out",
    "encoder.final.2": "encoder.conv_out",
    "encoder.final.3": "quant_conv",
    "decoder.quant_conv_in": "post_quant_conv",
    "decoder.mid.0": "decoder.mid.block_1",
    "decoder.mid.1": "decoder.mid.attn_1",
    "decoder.mid.2": "decoder.mid.block_2",
    "decoder.final.0": "decoder.norm_out",
    "decoder.final.2": "decoder.conv_out",
    "quantizer.embedding": "quantize.embedding",
}
LAYERS = {  # below a module
    **{"block.0": "norm1", "block.2": "conv1", "block.3": "norm2", "block.6": "conv2", "shortcut": "nin_shortcut"},
    **{"norm": "norm", "attn.q": "q", "attn.k": "k", "attn.v": "v", "attn.out_proj": "proj_out"},
    "conv": "conv",
}


def _from_clip_gen(state: State) -> State:
    """clip-gen's names and tensors -> ours."""
    modules = MODULES | _links(state, "encoder.down") | _links(state, "decoder.up")
    modules |= {f"{at}.{theirs}": f"{to}.{ours}" for at, to in modules.items() for theirs, ours in LAYERS.items()}
    ours = {}
    for name, tensor in _taken_apart(state):
        module, _, kind = name.rpartition(".")
        if not name.startswith("discriminator."):
            ours[f"{modules[module]}.{kind}" if module in modules else name] = tensor
    return ours


def _links(state: State, chain: str) -> dict[str, str]:
    """The name of each link of a half's chain with us: "decoder.up.6" -> "decoder.up.4.upsample".

    A convolution of its own ends a level. The chain runs from level 0 down, or up to it.
    """
    found = (re.match(rf"{re.escape(chain)}\.(\d+)\.(block|shortcut|norm|attn|conv)\.", name) for name in state)
    kinds = {int(link[1]): {"shortcut": "block", "norm": "attn"}.get(link[2], link[2]) for link in found if link}
    up = chain.endswith(".up")
    level = list(kinds.values()).count("conv") if up else 0
    links, count = {}, Counter()
    for number, kind in sorted(kinds.items()):
        if kind == "conv":
            links[f"{chain}.{number}"] = f"{chain}.{level}.{'upsample' if up else 'downsample'}"
            level += -1 if up else 1
        else:
            links[f"{chain}.{number}"] = f"{chain}.{level}.{kind}.{count[level, kind]}"
            count[level, kind] += 1
    return links


def _taken_apart(state: State) -> Iterator[tuple[str, Tensor]]:
    """nn.MultiheadAttention's tensors as those of 1x1 convolutions, its q, k and v each for itself."""
    for name, tensor in state.items():
        if ".attn." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        if joint := re.fullmatch(r"(.*\.attn)\.in_proj_(weight|bias)", name):
            for part, third in zip("qkv", tensor.tensor_split(3), strict=True):
                yield f"{joint[1]}.{part}.{joint[2]}", third
        else:
            yield name, tensor
