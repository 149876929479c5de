"""Published CLIP weights <-> ours. A state maps names to tensors; our config is what ClipConfig.from_dict takes.

To export a model for other programs:

    state, config = clip.to_hugging_face(model.state_dict(), dataclasses.asdict(model.config))
    weights.write(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.converters import clip_config
from zoo.converters.clip_config import Facts, agree, nested
from zoo.converters.clip_names import CHINESE, HUGGING_FACE, OPENAI, PUBLISHED, TRANSPOSED, Layout
from zoo.errors import WeightsMismatch

State = dict[str, Tensor]

log = logging.getLogger(__name__)

# What training scripts, DataParallel and torch.compile put before every name.
WRAPPERS = ("state_dict.", "module.", "_orig_mod.")
TORCHSCRIPT_ONLY = {"input_resolution", "context_length", "vocab_size"}
# Buffers that are computed, and heads that none of these towers use.
IGNORED = re.compile(r"(^|\.)(attn_mask|position_ids|token_type_ids)$|^(bert|text_model|text_model\.roberta)\.pooler\.")
HEAD_WIDTH = 64  # of every tower up to WIDEST; what is wider was published with heads of 80 to 104
WIDEST = 1024
# What each bidirectional tower was published with: Chinese-CLIP, and AltCLIP with its bridge.
CHINESE_TEXT = {"pad": 0, "first_position": 0, "eps": 1e-12, "context": 52, "activation": "gelu"}
ALT_TEXT = {"pad": 1, "first_position": 2, "eps": 1e-5, "context": 77, "activation": "gelu"}


# --- reading ---
def to_ours(state: Mapping[str, Tensor], config: Mapping) -> tuple[State, dict[str, Any]]:
    """A state of any published layout (or ours), and what its files or its card say -> our state and config.

    The layout is found from the names, sizes from shapes, and what shapes cannot tell (activation, heads,
    preprocessing) from `config`: ours, Hugging Face's, open_clip's, or several of them merged. Tensors that the layout
    does not know keep their names, so that strict loading reports them.
    Raises WeightsMismatch for weights of another kind, and where shapes and configs contradict each other.
    """
    state = _unwrapped(state)
    from_torchscript = TORCHSCRIPT_ONLY <= state.keys()
    state = {name: t for name, t in state.items() if name not in TORCHSCRIPT_ONLY and not IGNORED.search(name)}
    layout = None if "text.embed.weight" in state else _layout_of(state)
    ours = _renamed(state, layout) if layout else state
    shapes = clip_config.from_shapes(ours)
    # A ratio that a config gives need not be exactly that of the rounded shapes; strict loading compares those.
    ratios = {field: shapes.pop(field) for field in list(shapes) if field.endswith("mlp_ratio")}
    facts = ratios | agree(
        {
            "the shapes of the tensors": shapes,
            "zoo's config (the card, or a config.json that zoo wrote)": clip_config.from_ours(config),
            "config.json": clip_config.from_hugging_face(config),
            "preprocessor_config.json": clip_config.from_preprocessor(config),
            "open_clip_config.json": clip_config.from_open_clip(config),
        }
    )
    sure = from_torchscript or layout in CHINESE  # both were only ever published with OpenAI's activation
    return ours, nested(_completed(facts, clip_config.is_bert(ours), sure))


def _unwrapped(state: Mapping[str, Tensor]) -> State:
    for wrapper in WRAPPERS:
        inner = {name.removeprefix(wrapper): t for name, t in state.items() if name.startswith(wrapper)}
        state = inner or state
    return dict(state)


def _layout_of(state: State) -> Layout:
    for layout in PUBLISHED:
        if all(mark in state for mark in layout.marks):
            return layout
    known = ", ".join(dict.fromkeys(layout.name for layout in PUBLISHED))
    some = ", ".join(sorted(state)[:3]) or "none"
    raise WeightsMismatch(
        f"these {len(state)} tensors ({some}, ...) are not a CLIP of both an image and a text tower in a layout that "
        f"zoo reads: {known}, or zoo's own. Check that the file is of the model that was asked for"
    )


def _renamed(state: State, layout: Layout) -> State:
    left = {_as_published(name): tensor for name, tensor in state.items()}
    depth = 1 + max((int(number) for name in left for number in re.findall(r"\.(\d+)\.", name)), default=0)
    ours: State = {}
    for name, theirs in layout.pairs(depth):
        if all(their in left for their in theirs):
            parts = [left.pop(their) for their in theirs]
            tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
            ours[name] = tensor.T.contiguous() if theirs[0] in TRANSPOSED else tensor
    return ours | left


def _as_published(name: str) -> str:
    """Some versions of transformers save a vision tower's `layers` as `layer`, and BERT's `layer` as `layers`."""
    if name.startswith("vision_model."):
        return name.replace(".encoder.layer.", ".encoder.layers.")
    return re.sub(r"\.encoder\.layers\.(\d+)\.(attention|intermediate|output)\.", r".encoder.layer.\1.\2.", name)


def _completed(facts: Facts, bert: bool, sure: bool) -> Facts:
    """Facts with what was published with such weights where nothing said it."""
    defaults: Facts = {}
    if bert:
        tower = ALT_TEXT if facts["text.bridge"] else CHINESE_TEXT
        defaults |= {f"text.{field}": value for field, value in tower.items()}
        room = facts["text.positions"] - facts.get("text.first_position", tower["first_position"])
        defaults["text.context"] = min(tower["context"], room)
        defaults["resize"] = "shortest" if facts["text.bridge"] else "squash"
    for tower in ("image", "text"):
        if f"{tower}.depth" in facts:
            if f"{tower}.heads" not in facts:
                defaults[f"{tower}.heads"] = _usual_heads(tower, facts[f"{tower}.width"])
            if not sure and f"{tower}.activation" not in defaults | facts:
                log.warning("nothing beside these weights says which GELU the %s tower has: taking quick_gelu", tower)
            defaults.setdefault(f"{tower}.activation", "quick_gelu")
    return defaults | facts


def _usual_heads(tower: str, width: int) -> int:
    if width > WIDEST or width % HEAD_WIDTH:
        raise WeightsMismatch(
            f"nothing beside these weights says how many heads the {tower} tower of width {width} has, and shapes "
            f"cannot tell: name the model's own card, or put config.json or open_clip_config.json beside the weights"
        )
    return width // HEAD_WIDTH


# --- writing ---
def to_openai(state: Mapping[str, Tensor], config: Mapping) -> State:
    """Our state -> OpenAI's layout, which open_clip reads too; of a Chinese-CLIP, that of OFA-Sys/Chinese-CLIP.

    Bitwise what it was read from. Such a file has no place for the config: say quick_gelu or gelu where it is loaded.
    Raises WeightsMismatch for an AltCLIP, which has no such layout.
    """
    return _written(state, OPENAI + CHINESE)


def to_hugging_face(state: Mapping[str, Tensor], config: Mapping) -> tuple[State, dict[str, Any]]:
    """Our state and config -> those of a CLIPModel, ChineseCLIPModel or AltCLIPModel (its config.json).

    Raises WeightsMismatch for a ResNet or a SigLIP loss, which those classes do not have.
    """
    theirs = _written(state, HUGGING_FACE)
    image, text = config["image"], config["text"]
    vision = {name: image[ours] for name, ours in clip_config.HF_VISION.items()}
    vision["intermediate_size"] = round(image["width"] * image["mlp_ratio"])
    kind = ("altclip" if text.get("bridge") else "chinese_clip") if "pad" in text else "clip"
    names = clip_config.HF_BERT_TEXT if "pad" in text else clip_config.HF_CLIP_TEXT
    words = {name: text[ours] for name, ours in names.items() if text.get(ours) is not None}
    words["intermediate_size"] = round(text["width"] * text["mlp_ratio"])
    if kind == "clip":
        words |= {"bos_token_id": text["vocab"] - 2, "eos_token_id": text["vocab"] - 1}
    architecture = {"clip": "CLIPModel", "chinese_clip": "ChineseCLIPModel", "altclip": "AltCLIPModel"}[kind]
    embed = {"projection_dim": config["embed"]}
    towers = {"vision_config": vision | embed, "text_config": words if "pad" in text else words | embed}
    return theirs, {"architectures": [architecture], "model_type": kind, **embed, **towers}


def to_hugging_face_preprocessor(config: Mapping) -> dict[str, Any]:
    """Our config -> the preprocessor_config.json of a CLIPImageProcessor."""
    size, shortest = config["image"]["size"], config["resize"] == "shortest"
    square = {"height": size, "width": size}
    codes = {name: code for code, name in clip_config.PIL_RESAMPLING.items()}
    steps = dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"), True)
    return {
        "image_processor_type": "CLIPImageProcessor",
        **steps,
        "do_center_crop": shortest,
        "size": {"shortest_edge": size} if shortest else square,
        "crop_size": square,
        "resample": codes[config["interpolation"]],
        "image_mean": list(config["mean"]),
        "image_std": list(config["std"]),
    }


def _written(state: Mapping[str, Tensor], layouts: tuple[Layout, ...]) -> State:
    depth = 1 + max((int(number) for name in state for number in re.findall(r"\.(\d+)\.", name)), default=0)
    tables = [dict(layout.pairs(depth)) for layout in layouts]
    names = min(tables, key=lambda table: len(state.keys() - table.keys()))
    if nameless := sorted(state.keys() - names.keys()):
        raise WeightsMismatch(
            f"the {layouts[0].name} layout has no name for {', '.join(nameless[:3])}: it cannot hold this model"
        )
    theirs: State = {}
    for ours, tensor in state.items():
        parts = tensor.chunk(len(names[ours])) if len(names[ours]) > 1 else [tensor]
        for name, part in zip(names[ours], parts, strict=True):
            theirs[name] = part.T.contiguous() if name in TRANSPOSED else part
    return theirs
