"""LoRA files of Stable Diffusion, in every dialect that they are published in -> what to add to which of our weights.

Sources: diffusers, loaders/lora_conversion_utils.py and utils/state_dict_utils.py; kohya-ss/sd-scripts,
networks/lora.py; CompVis/stable-diffusion, openaimodel.py, for the block names that LyCORIS takes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.converters.modules import rename
from zoo.converters.unet import compvis_modules
from zoo.errors import WeightsMismatch

# How the name of a tensor ends, after that of its layer.
_ROLES = {
    "down": re.compile(r"(.+?)\.(?:lora_A(?:\.\w+)?|lora\.down|lora_linear_layer\.down|lora_down|down)\.weight"),
    "up": re.compile(r"(.+?)\.(?:lora_B(?:\.\w+)?|lora\.up|lora_linear_layer\.up|lora_up|up)\.weight"),
    "alpha": re.compile(r"(.+)\.alpha"),
}
_OTHER_KINDS = {  # what such files hold beside or in place of two matrices
    "DoRA": re.compile(r"\.(dora_scale|lora_magnitude_vector(\.\w+)*)$"),
    "LoRA of a convolution with a core (Tucker)": re.compile(r"\.lora_mid\.weight$"),
    "LoHa": re.compile(r"\.hada_\w+$"),
    "LoKr": re.compile(r"\.lokr_\w+$"),
}
_TEXT = {  # our layer of a block: theirs, those of attention.qkv in the order of its rows
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.out_proj",),
    "mlp.up": ("mlp.fc1",),
    "mlp.down": ("mlp.fc2",),
}
_OLD_TEXT = {"q_proj": "to_q_lora", "k_proj": "to_k_lora", "v_proj": "to_v_lora", "out_proj": "to_out_lora"}
Place = tuple[str, int | None]  # a weight of ours, and which of its equal parts along the rows, or all


@dataclass(frozen=True)
class Delta:
    """What a LoRA adds to a weight, or to those `rows` of it: scale * up @ down.

    `down` (r, in), `up` (out, r); of a convolution (r, in, h, w) and (out, r, 1, 1), whose kernel is then h by w.
    """

    down: Tensor
    up: Tensor
    scale: float
    rows: slice | None = None

    @property
    def shape(self) -> torch.Size:
        """Of the matrix."""
        return torch.Size([len(self.up), *self.down.shape[1:]])

    def matrix(self) -> Tensor:
        """The sum to add, fp32, (out, in) or (out, in, h, w)."""
        return self.scale * (self.up.float().flatten(1) @ self.down.float().flatten(1)).reshape(self.shape)


def to_ours(state: Mapping[str, Tensor], names: Collection[str]) -> dict[str, list[Delta]]:
    """A LoRA's state and the names of our StableDiffusion's weights -> what is added to each weight that it changes.

    Reads the dialects of PEFT and diffusers ("unet.<layer>.lora_A.weight", ".lora.down.weight"; "text_encoder..."), of
    diffusers before ("...attn1.processor.to_q_lora.down.weight"), of kohya ("lora_unet_<layer>.lora_down.weight" and
    ".alpha"; "lora_te_..."), whose layers may have CompVis's names too, and what `blocks.lora.lora_state` wrote.
    The scale is alpha / r, and 1 where there is no alpha. Raises WeightsMismatch for names it does not know, halves
    that do not fit each other, and the kinds that are more than two matrices.
    """
    _check_kind(state)
    known = dict(_places(names))
    found: dict[Place, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in state.items():
        layer, role = _parsed(name)
        if layer not in known:
            unknown.append(name)
        elif role in (halves := found.setdefault(known[layer], {})):
            raise WeightsMismatch(f"this LoRA changes {known[layer][0]} twice, the second time by {name}")
        else:
            halves[role] = tensor
    if unknown or not found:
        raise WeightsMismatch(
            f"{len(unknown)} of the {len(state)} tensors of this LoRA are for no layer of this model: "
            f"{', '.join(sorted(unknown)[:5]) or 'there are none at all'}. It is a LoRA of another base, or of another "
            "kind, or no LoRA"
        )
    deltas: dict[str, list[Delta]] = {}
    for place, halves in found.items():
        deltas.setdefault(place[0], []).append(_delta(place, halves))
    return deltas


def split(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A StableDiffusion's weights with the LoRA of `blocks.lora` in them, at a scale of 1 -> those with it added, and
    the LoRA by itself, in PEFT's and diffusers' names.

    Raises WeightsMismatch for a layer that has no name there, such as those of a BERT.
    """
    merged, lora = dict(state), {}
    for layer in [name.removesuffix(".base.weight") for name in state if name.endswith(".base.weight")]:
        up = merged.pop(f"{layer}.up.weight")
        downs = merged.pop(f"{layer}.down.weight").split(up.shape[1])
        pairs = dict(zip(_peft_names(layer), zip(downs, up.chunk(len(downs)), strict=True), strict=True))
        for name, (down, part) in pairs.items():
            lora |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": part}
        product = torch.cat([part @ down for down, part in pairs.values()])
        merged[f"{layer}.weight"] = merged.pop(f"{layer}.base.weight") + product
        if f"{layer}.base.bias" in merged:
            merged[f"{layer}.bias"] = merged.pop(f"{layer}.base.bias")
    return merged, lora


def _check_kind(state: Mapping[str, Tensor]) -> None:
    for kind, mark in _OTHER_KINDS.items():
        if marked := sorted(filter(mark.search, state)):
            raise WeightsMismatch(
                f"this file is a {kind}, which zoo does not read ({marked[0]}): take a plain LoRA, or merge it into "
                "the model with the program that made it"
            )


def _parsed(name: str) -> tuple[str, str]:
    """The name of a tensor -> its layer's, and what it is to it; "" for a name of no such form."""
    for role, form in _ROLES.items():
        if match := form.fullmatch(name):
            return match[1], role
    return "", ""


def _delta(place: Place, halves: dict[str, Tensor]) -> Delta:
    name, part = place
    if missing := [role for role in ("down", "up") if role not in halves]:
        raise WeightsMismatch(f"this LoRA's change of {name} has no {missing[0]} matrix: the file is not whole")
    down, up = halves["down"], halves["up"]
    if down.dim() not in (2, 4) or up.shape[1:] != (len(down), *[1] * (down.dim() - 2)):
        raise WeightsMismatch(
            f"this LoRA's matrices for {name} do not fit each other: {tuple(down.shape)} and {tuple(up.shape)}"
        )
    scale = float(halves["alpha"]) / len(down) if "alpha" in halves else 1.0
    return Delta(down, up, scale, None if part is None else slice(part * len(up), (part + 1) * len(up)))


# --- names -----------------------------------------------------------------------------------------------------------
def _places(names: Collection[str]) -> Iterator[tuple[str, Place]]:
    """Every name that a layer of ours is published under, and its place. Underscored names cannot be cut at the right
    ones, so they are made from ours and looked up."""
    modules = _compvis(names)
    for name in names:
        layer = name.removesuffix(".weight")
        if layer == name:
            continue
        yield layer, (name, None)
        if layer.startswith("unet."):
            layer = layer.removeprefix("unet.")
            for published in {layer, rename(layer, modules)}:
                yield from ((form, (name, None)) for form in _unet_forms(published))
        elif match := re.fullmatch(r"text\.transformer\.blocks\.(\d+)\.(.+)", layer):
            parts = _TEXT.get(match[2], ())
            for part, theirs in enumerate(parts):
                published = f"encoder.layers.{match[1]}.{theirs}"
                yield from ((form, (name, part if len(parts) > 1 else None)) for form in _text_forms(published))


def _peft_names(layer: str) -> list[str]:
    """Of a layer, or of the several that are one of ours."""
    match = re.fullmatch(r"text\.transformer\.blocks\.(\d+)\.(.+)", layer)
    if match and match[2] in _TEXT:
        return [f"text_encoder.text_model.encoder.layers.{match[1]}.{theirs}" for theirs in _TEXT[match[2]]]
    if not layer.startswith("unet."):
        raise WeightsMismatch(f"diffusers has no name for LoRA of {layer}: train that of the UNet and of CLIP's tower")
    return [layer]


def _compvis(names: Collection[str]) -> dict[str, str]:
    """The modules of the UNet of those weights -> CompVis's."""
    down = re.compile(r"unet\.down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.")
    found = {match.groups() for name in names if (match := down.match(name))}
    levels = {int(level) for level, _, _ in found}
    blocks = {number for level, kind, number in found if (level, kind) == ("0", "resnets")}
    attention = {int(level) for level, kind, _ in found if kind == "attentions"}
    return compvis_modules(len(levels), len(blocks), tuple(attention))


def _unet_forms(layer: str) -> Iterator[str]:
    yield f"lora_unet_{layer.replace('.', '_')}"
    attention, _, last = layer.rpartition(".to_")
    for prefix in ("unet.", ""):  # the first files had none
        yield prefix + layer
        if attention:
            yield f"{prefix}{attention}.processor.to_{last.removesuffix('.0')}_lora"


def _text_forms(layer: str) -> Iterator[str]:
    yield f"lora_te_text_model_{layer.replace('.', '_')}"
    attention, _, last = layer.rpartition(".")
    for prefix in ("text_encoder.text_model.", "text_encoder."):  # transformers 5.6 took text_model out
        yield prefix + layer
        if last in _OLD_TEXT:
            yield f"{prefix}{attention}.{_OLD_TEXT[last]}"
