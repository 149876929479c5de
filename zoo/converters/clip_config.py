"""What the shapes of a CLIP's tensors, and published configs, say about it: facts, as `our field, dotted -> value`.

Sources: openai/CLIP, clip/model.py, build_model (shapes); transformers, configuration_{clip,chinese_clip,altclip}.py
and image_processing_clip.py; open_clip, src/open_clip/factory.py and model_configs/.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.errors import WeightsMismatch

if TYPE_CHECKING:
    from torch import Tensor

Facts = dict[str, Any]

PREPROCESSING = ("mean", "std", "resize", "interpolation")
OUR_FIELDS = ("embed", "image", "text", "loss", *PREPROCESSING)
HF_BOTH = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "hidden_act": "activation",
}
HF_VISION = HF_BOTH | {"image_size": "size", "patch_size": "patch"}
HF_CLIP_TEXT = HF_BOTH | {"vocab_size": "vocab", "max_position_embeddings": "context"}
HF_BERT_TEXT = HF_BOTH | {
    "vocab_size": "vocab",
    "max_position_embeddings": "positions",
    "type_vocab_size": "types",
    "layer_norm_eps": "eps",
    "pad_token_id": "pad",
    "project_dim": "bridge",
}
# transformers may leave out of a config.json what equals its classes' defaults.
HF_VISION_DEFAULTS = {"num_attention_heads": 12, "hidden_act": "quick_gelu"}
HF_TEXT_DEFAULTS = {
    "clip": {"num_attention_heads": 8, "hidden_act": "quick_gelu"},
    "chinese_clip": {"num_attention_heads": 12, "hidden_act": "gelu"},
    "altclip": {"num_attention_heads": 16, "hidden_act": "gelu", "project_dim": 768, "pad_token_id": 1},
}
SHOWN_CLASHES = 4
PIL_RESAMPLING = {2: "bilinear", 3: "bicubic"}
OPEN_CLIP_VISION = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio", "patch_dropout"}
OPEN_CLIP_TEXT = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}


# --- shapes of our tensors ---
def from_shapes(state: Mapping[str, Tensor]) -> Facts:
    """The sizes that our tensors have. Raises WeightsMismatch where one that tells a size is missing."""
    facts: Facts = {
        "embed": _size(state, "text.project.weight"),
        "loss": "sigmoid" if "logit_bias" in state else "softmax",
    }
    if "image.class_token" in state:
        facts |= _transformer(state, "image", "image.transformer.blocks")
        patch = _size(state, "image.patch.weight", 3)
        facts |= {"image.patch": patch, "image.size": patch * math.isqrt(_size(state, "image.positions") - 1)}
    else:
        facts["image.width"] = _size(state, "image.layers.0.0.conv1.weight")
        facts["image.layers"] = [_count(state, f"image.layers.{level}") for level in range(4)]
        facts["image.size"] = 32 * math.isqrt(_size(state, "image.pool.positions") - 1)
    facts["text.vocab"] = _size(state, "text.embed.weight")
    if is_bert(state):
        facts |= _transformer(state, "text", "text.blocks")
        facts["text.positions"] = _size(state, "text.positions.weight")
        facts["text.types"] = _size(state, "text.types.weight")
        bridged = "text.bridge.linear.weight" in state
        facts["text.bridge"] = _size(state, "text.bridge.linear.weight") if bridged else None
    else:
        facts |= _transformer(state, "text", "text.transformer.blocks")
        facts["text.context"] = _size(state, "text.positions")
    return facts


def is_bert(state: Mapping[str, Tensor]) -> bool:
    """Whether the text tower is bidirectional."""
    return "text.positions.weight" in state


def _size(state: Mapping[str, Tensor], name: str, axis: int = 0) -> int:
    if name not in state or state[name].ndim <= axis:
        raise WeightsMismatch(f"these weights have no {name}, from which a CLIP's sizes are read")
    return state[name].shape[axis]


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered blocks there are below a prefix."""
    numbers = (name[len(prefix) + 1 :].partition(".")[0] for name in state if name.startswith(prefix + "."))
    return max((int(number) + 1 for number in numbers if number.isdigit()), default=0)


def _transformer(state: Mapping[str, Tensor], tower: str, blocks: str) -> Facts:
    width = _size(state, f"{blocks}.0.attention.out.weight")
    ratio = _size(state, f"{blocks}.0.mlp.up.weight") / width
    return {f"{tower}.width": width, f"{tower}.depth": _count(state, blocks), f"{tower}.mlp_ratio": ratio}


# --- configs ---
def from_ours(config: Mapping) -> Facts:
    """A card's config, or the config.json that a run folder holds."""
    if not isinstance(config.get("image"), Mapping) or not isinstance(config.get("text"), Mapping):
        return {}
    return _flat({field: config[field] for field in OUR_FIELDS if field in config})


def _flat(config: Mapping, prefix: str = "") -> Facts:
    facts: Facts = {}
    for field, value in config.items():
        if isinstance(value, Mapping):
            facts |= _flat(value, f"{prefix}{field}.")
        else:
            facts[prefix + field] = list(value) if isinstance(value, tuple) else value
    return facts


def from_hugging_face(config: Mapping) -> Facts:
    """The config.json of a CLIPModel, ChineseCLIPModel or AltCLIPModel."""
    if "vision_config" not in config or "text_config" not in config:
        return {}
    # Old files repeat a tower's config as *_config_dict, which transformers lets win.
    vision = HF_VISION_DEFAULTS | config["vision_config"] | (config.get("vision_config_dict") or {})
    text = config["text_config"] | (config.get("text_config_dict") or {})
    kind = config.get("model_type", "clip")
    text = HF_TEXT_DEFAULTS.get(kind, HF_TEXT_DEFAULTS["clip"]) | text
    bert = kind in ("chinese_clip", "altclip") or "type_vocab_size" in text
    for tower in (vision,) if bert else (vision, text):
        if tower.get("layer_norm_eps", 1e-5) != 1e-5:
            raise WeightsMismatch(f"config.json: layer_norm_eps is {tower['layer_norm_eps']}; zoo's CLIP has 1e-5")
    names = HF_BERT_TEXT if bert else HF_CLIP_TEXT
    facts = {f"image.{ours}": vision[theirs] for theirs, ours in HF_VISION.items() if theirs in vision}
    facts |= {f"text.{ours}": text[theirs] for theirs, ours in names.items() if theirs in text}
    if "text.bridge" in facts:
        facts["text.first_position"] = facts["text.pad"] + 1  # RoBERTa's padding has a position of its own
    return facts


def from_preprocessor(config: Mapping) -> Facts:
    """The preprocessor_config.json, or processor_config.json, beside a Hugging Face model."""
    config = config.get("image_processor", config)
    facts: Facts = {
        ours: config[theirs] for theirs, ours in (("image_mean", "mean"), ("image_std", "std")) if theirs in config
    }
    if "resample" in config:
        if config["resample"] not in PIL_RESAMPLING:
            raise WeightsMismatch(f"preprocessor_config.json: resample {config['resample']} is not bilinear or bicubic")
        facts["interpolation"] = PIL_RESAMPLING[config["resample"]]
    if facts and "size" in config:
        shortest = isinstance(config["size"], int) or "shortest_edge" in config["size"]
        facts["resize"] = "shortest" if shortest else "squash"
    return facts


def from_open_clip(config: Mapping) -> Facts:
    """open_clip_config.json. Raises WeightsMismatch for options that our networks do not have."""
    if "model_cfg" not in config:
        return {}
    model, preprocess = config["model_cfg"], config.get("preprocess_cfg") or {}
    vision, text = model.get("vision_cfg") or {}, model.get("text_cfg") or {}
    if others := sorted((vision.keys() - OPEN_CLIP_VISION) | (text.keys() - OPEN_CLIP_TEXT)):
        raise WeightsMismatch(f"open_clip_config.json: zoo's CLIP does not have the options {', '.join(others)}")
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    facts: Facts = {"embed": model.get("embed_dim"), "text.activation": activation}
    names = {"context_length": "context", "vocab_size": "vocab", "width": "width", "heads": "heads", "layers": "depth"}
    facts |= {f"text.{ours}": text.get(theirs) for theirs, ours in names.items()}
    facts |= {"image.size": vision.get("image_size"), "image.width": vision.get("width")}
    if isinstance(vision.get("layers"), list):
        facts["image.layers"] = vision["layers"]
    else:
        facts |= {"image.depth": vision.get("layers"), "image.patch": vision.get("patch_size")}
        facts["image.activation"] = activation
        facts["image.heads"] = vision.get("width", 0) // vision.get("head_width", 64) or None
    words = {"mean": "mean", "std": "std", "resize_mode": "resize", "interpolation": "interpolation"}
    facts |= {ours: preprocess.get(theirs) for theirs, ours in words.items()}
    return {field: value for field, value in facts.items() if value is not None}


# --- all together ---
def agree(sources: Mapping[str, Facts]) -> Facts:
    """The facts of all sources, named. Raises WeightsMismatch where two contradict each other."""
    facts: Facts = {}
    said: dict[str, str] = {}
    clashes: list[str] = []
    for source, its_facts in sources.items():
        for field, value in its_facts.items():
            if facts.setdefault(field, value) != value:
                clashes.append(f"{field} is {facts[field]!r} by {said[field]} and {value!r} by {source}")
            said.setdefault(field, source)
    if clashes:
        raise WeightsMismatch("these are of two different models: " + "; ".join(clashes[:SHOWN_CLASHES]))
    return facts


def nested(facts: Facts) -> dict[str, Any]:
    """{"image.width": 768} -> {"image": {"width": 768}}."""
    config: dict[str, Any] = {}
    for field, value in facts.items():
        tower, _, name = field.rpartition(".")
        (config.setdefault(tower, {}) if tower else config)[name] = value
    return config
