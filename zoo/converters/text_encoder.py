"""Published weights of the text towers that a UNet reads <-> ours. A state maps names to tensors; our config is what
TextConfig takes, or BertTextConfig, or LdmTextConfig; `tower_of` tells which.

Layouts, each with any prefix:
    transformers     CLIPTextModel, text_model. before its names or not, as its versions have it; OpenAI's tower
    open_clip        the text half of a CLIP, as in the files of Stable Diffusion 2, of which the last block is not used
    BERT             BertModel, of Taiyi-Stable-Diffusion
    XLM-RoBERTa      RobertaSeriesModelWithTransformation of AltDiffusion; with transformation_pre that of
                     AltDiffusion-m18, which leaves the last block out
    latent diffusion its own tower, as CompVis and diffusers hold it: see ldm_text

Sources: transformers, models/clip; Stability-AI/stablediffusion, FrozenOpenCLIPEmbedder; diffusers, alt_diffusion,
modeling_roberta_series.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.converters import ldm_text
from zoo.converters.clip_names import BERT, HF_TEXT, OPENAI_TEXT, Layout, Names
from zoo.converters.modules import State, below, count, refuse, some
from zoo.errors import WeightsMismatch

UNUSED = re.compile(
    r"(^|.*\.)(position_ids|token_type_ids|attn_mask)$|(roberta\.)?pooler\.|text_projection|logit_scale$|"
    r"(.*\.)?to_logits\."
)
OPENCLIP_DEPTH = 24  # of the tower that Stable Diffusion 2 has; its last block is left out
HEAD_WIDTH = 64  # of every published tower
CLIP_FIXED = {"layer_norm_eps": 1e-5}  # of a CLIPTextModel
# What no shape tells, of each kind. `masked`: whether padding is hidden, by the source's pipelines.
CLIP_SAID = {"activation": "quick_gelu"}
OPENCLIP_SAID = {"activation": "gelu"}
BERT_SAID = {"context": 512, "activation": "gelu", "eps": 1e-12, "first_position": 0, "pad": 0, "masked": False}
XLMR_SAID = {"context": 77, "activation": "gelu", "eps": 1e-5, "first_position": 2, "pad": 1, "masked": True}
# The ids around a prompt, by tokenizer; those of CLIP's are its last ones.
ENDS = {"clip": {}, "bert": {"start": 101, "end": 102, "pad": 0}, "xlm-roberta": {"start": 0, "end": 2, "pad": 1}}
BRIDGE, M18_BRIDGE = {"bridge.*": "transformation.*"}, {"norm_out.*": "pre_LN.*", "bridge.*": "transformation_pre.*"}


def _tower(names: Names, prefix: str = "") -> Names:
    """A table of clip_names without its prefixes and the projection, which no UNet reads."""

    def bare(theirs: str | tuple[str, ...]) -> str | tuple[str, ...]:
        return (
            theirs.removeprefix(prefix)
            if isinstance(theirs, str)
            else tuple(name.removeprefix(prefix) for name in theirs)
        )

    return {a.removeprefix("text."): bare(b) for a, b in names.items() if not a.startswith("text.project")}


def _prefixed(names: Names, prefix: str) -> Names:
    return {a: prefix + b if isinstance(b, str) else tuple(prefix + part for part in b) for a, b in names.items()}


@dataclass(frozen=True)
class Tower:
    """One published layout, whose tensor of words is called `mark`; what no shape tells of it, and what its config.json
    may not say otherwise; and the kind of its tokenizer."""

    layout: Layout
    said: Mapping[str, Any]
    fixed: Mapping[str, Any]
    tokenizer: str

    @property
    def mark(self) -> str:
        return self.layout.marks[0]

    @property
    def ends(self) -> Mapping[str, int]:
        """The ids around a prompt, none for CLIP's."""
        return ENDS[self.tokenizer]


def _known(
    name: str, mark: str, names: Names, said: Mapping[str, Any], fixed: Mapping[str, Any], tokenizer: str
) -> Tower:
    return Tower(Layout(name, (mark,), names), said, fixed, tokenizer)


_HF_MARK, _ROBERTA_MARK = "embeddings.token_embedding.weight", "roberta.embeddings.word_embeddings.weight"
_ROBERTA = _prefixed(BERT, "roberta.")
HF = _known("transformers", _HF_MARK, _tower(HF_TEXT, "text_model."), CLIP_SAID, CLIP_FIXED, "clip")
OPENCLIP = _known("open_clip", "token_embedding.weight", _tower(OPENAI_TEXT), OPENCLIP_SAID, CLIP_FIXED, "clip")
M18 = _known("XLM-RoBERTa", _ROBERTA_MARK, _ROBERTA | M18_BRIDGE, XLMR_SAID, {}, "xlm-roberta")
XLMR = _known("XLM-RoBERTa", _ROBERTA_MARK, _ROBERTA | BRIDGE, XLMR_SAID, {}, "xlm-roberta")
CHINESE = _known("BERT", "embeddings.word_embeddings.weight", BERT, BERT_SAID, {}, "bert")
LDM = _known("CompVis", "token_emb.weight", ldm_text.COMPVIS, ldm_text.SAID, {}, "bert")
LDM_BERT = _known("diffusers", "embed_tokens.weight", ldm_text.DIFFUSERS, ldm_text.SAID, ldm_text.FIXED, "bert")
OURS = "embed.weight"
TOWERS = (HF, OPENCLIP, XLMR, CHINESE, LDM, LDM_BERT)  # in order: the marks of the first are longer


def tower_of(config: Mapping) -> Tower:
    """The tower of our config, in the layout that transformers or diffusers has for it."""
    if "head_width" in config:
        return LDM_BERT
    if "pad" not in config:
        return HF
    return M18 if config.get("norm") else XLMR if config.get("bridge") else CHINESE


def to_ours(state: Mapping[str, Tensor], config: Mapping) -> tuple[State, dict[str, Any]]:
    """A state of any of these layouts (or ours), and what its files or its card say -> our state and config.

    Sizes come from shapes; from `config`, transformers' or ours, what shapes cannot tell: heads, unless they are of 64,
    activation, eps. Position ids, poolers and projections are left out, as is open_clip's last block. What else is not
    known keeps its name, so that strict loading reports it. Raises WeightsMismatch for weights of another kind.
    """
    if OURS in state:
        if "width" not in config:
            raise WeightsMismatch("the sizes of this text tower are not known: config.json must lie beside the weights")
        return dict(state), dict(config)
    tower, prefix = _found(state)
    inside = below(state, prefix)
    beside = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    left = {name: t for name, t in (inside | beside).items() if not UNUSED.match(name)}
    if tower is XLMR:
        tower, unused = (M18, "transformation.") if "transformation_pre.weight" in left else (XLMR, "pre_LN.")
        left = {name: tensor for name, tensor in left.items() if not name.startswith(unused)}
    if tower is OPENCLIP:
        left = _without_last(left, whole="text_projection" in inside)
    if tower is LDM:
        left = ldm_text.paired(left)
    refuse(config, tower.fixed, "text tower")
    # Some versions of transformers save BERT's `layer` as `layers`.
    left = {
        re.sub(r"\bencoder\.layers\.(\d+)\.(attention|interm|output)", r"encoder.layer.\1.\2", n): t
        for n, t in left.items()
    }
    ours: State = {}
    for name, theirs in tower.layout.pairs(1 + _blocks(left)):
        if all(their in left for their in theirs):
            parts = [left.pop(their) for their in theirs]
            ours[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
    return ours | left, _config(ours, config, tower)


def _found(state: Mapping[str, Tensor]) -> tuple[Tower, str]:
    for tower in TOWERS:
        for name in state:
            prefix = name.removesuffix(tower.mark)
            if prefix != name and (not prefix or prefix.endswith(".")):
                return tower, prefix
    raise WeightsMismatch(
        f"these {some(state)} are no text tower of a Stable Diffusion as transformers, open_clip, AltDiffusion or "
        "latent diffusion published it, nor zoo's own"
    )


def _blocks(state: State) -> int:
    return count(state, r".*?\b(?:layers?|resblocks|blocks)\.(\d+)\.")


def _without_last(state: State, whole: bool) -> State:
    """open_clip's tower as Stable Diffusion 2 reads it; one that has its projection, or all blocks, is whole."""
    depth = _blocks(state)
    last = f"transformer.resblocks.{depth - 1}."
    drop = whole or depth == OPENCLIP_DEPTH
    return {name: tensor for name, tensor in state.items() if not (drop and name.startswith(last))}


def _config(ours: State, config: Mapping, tower: Tower) -> dict[str, Any]:
    vocab, width = ours["embed.weight"].shape
    up = ours.get("transformer.blocks.0.mlp.up.weight", ours.get("blocks.0.mlp.up.weight"))
    if up is None:
        raise WeightsMismatch("this text tower has no blocks; fetch the file again")
    said = {**tower.said, **{name: config[name] for name in tower.said if name in config}}
    theirs = {
        "activation": "hidden_act",
        "eps": "layer_norm_eps",
        "pad": "pad_token_id",
        "masked": "use_attention_mask",
        "heads": "encoder_attention_heads",
    }
    said |= {ours: config[name] for ours, name in theirs.items() if ours in tower.said and name in config}
    if tower in (LDM, LDM_BERT):
        inner = ours.get("blocks.0.attention.qkv.weight", up[:0]).shape[0] // 3
        sizes = {"context": ours["positions"].shape[0], "vocab": vocab, "width": width, "depth": _blocks(ours)}
        return {**said, **sizes, "head_width": inner // said["heads"], "mlp_ratio": up.shape[0] / width}
    sizes = {
        "vocab": vocab,
        "width": width,
        "depth": _blocks(ours),
        "heads": config.get("num_attention_heads", config.get("heads", max(1, width // HEAD_WIDTH))),
        "mlp_ratio": up.shape[0] / width,
    }
    if tower in (HF, OPENCLIP):
        return {**said, **sizes, "context": ours["positions"].shape[0]}
    rows, types = ours["positions.weight"].shape[0], ours["types.weight"].shape[0]
    bridge = ours["bridge.weight"].shape[0] if "bridge.weight" in ours else None
    room = min(said["context"], rows - said["first_position"])
    more = {"positions": rows, "types": types, "bridge": bridge, "context": room}
    return {**said, **sizes, **more, "penultimate": tower is M18, "norm": tower is M18}


# --- writing ---------------------------------------------------------------------------------------------------------
def to_transformers(state: Mapping[str, Tensor], config: Mapping) -> tuple[State, dict[str, Any]]:
    """Our state and config -> those of a CLIPTextModel as its files hold it, a BertModel, AltDiffusion's
    RobertaSeriesModelWithTransformation (its config.json), or diffusers' LDMBertModel without its head."""
    tower = tower_of(config)
    theirs = _written(state, tower.layout)
    if tower is LDM_BERT:
        return {f"model.{name}": tensor for name, tensor in theirs.items()}, ldm_text.to_config(config)
    sizes = {
        "vocab_size": config["vocab"],
        "hidden_size": config["width"],
        "intermediate_size": round(config["width"] * config["mlp_ratio"]),
        "num_hidden_layers": config["depth"],
        "num_attention_heads": config["heads"],
        "hidden_act": config["activation"],
    }
    if tower is HF:
        ends = {"bos_token_id": config["vocab"] - 2, "eos_token_id": config["vocab"] - 1, "pad_token_id": 1}
        sizes |= {"max_position_embeddings": config["context"], **CLIP_FIXED, **ends}
        # Before 5.6 the class had a module of that name, and newer ones read it too.
        theirs = {f"text_model.{name}": tensor for name, tensor in theirs.items()}
        return theirs, {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **sizes}
    sizes |= {"max_position_embeddings": config["positions"], "layer_norm_eps": config["eps"]}
    sizes |= {"type_vocab_size": config["types"], "pad_token_id": config["pad"]}
    if tower is CHINESE:
        return theirs, {"architectures": ["BertModel"], "model_type": "bert", **sizes}
    kind = {"architectures": ["RobertaSeriesModelWithTransformation"], "model_type": "xlm-roberta"}
    bridge = {"project_dim": config["bridge"], "has_pre_transformation": tower is M18}
    return theirs, {**kind, **sizes, **bridge, "use_attention_mask": config["masked"]}


def to_compvis(state: Mapping[str, Tensor], config: Mapping) -> State:
    """Our state and config -> what is below cond_stage_model. in CompVis's files, or, of OpenCLIP's tower, in
    Stability AI's, without what is not used: block and projection, or head. Raises WeightsMismatch for other towers."""
    known = tower_of(config)
    if known is LDM_BERT:
        theirs = ldm_text.unpaired(_written(state, LDM.layout))
        return {f"transformer.{name}": tensor for name, tensor in theirs.items()}
    if known is not HF:
        raise WeightsMismatch("CompVis's files have no place for a BERT: hand this model on as diffusers' folder")
    tower, prefix = (HF, "transformer.text_model.") if config["activation"] == "quick_gelu" else (OPENCLIP, "model.")
    return {prefix + name: tensor for name, tensor in _written(state, tower.layout).items()}


def _written(state: Mapping[str, Tensor], layout: Layout) -> State:
    names = dict(layout.pairs(1 + _blocks(dict(state))))
    if nameless := sorted(state.keys() - names.keys()):
        raise WeightsMismatch(
            f"{layout.name} has no name for {', '.join(nameless[:3])}: it cannot hold this text tower"
        )
    theirs: State = {}
    for ours, tensor in state.items():
        theirs |= dict(zip(names[ours], tensor.chunk(len(names[ours])), strict=True))
    return theirs
