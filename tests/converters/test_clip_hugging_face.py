"""Folders of transformers' CLIPModel, ChineseCLIPModel and AltCLIPModel, read and written."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from zoo import AutoLoader, weights
from zoo.converters import clip
from zoo.errors import WeightsMismatch
from zoo.models.clip import Clip, ClipConfig, TextConfig, VitConfig
from zoo.models.clip_bert import BertConfig
from zoo.models.clip_resnet import ResNetConfig

VOCAB, CONTEXT = 60, 12
VISION = dict(
    hidden_size=32, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
)
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=CONTEXT,
)
# transformers' classes by model_type: model, config, what the text config has beyond TEXT, and the padding.
KINDS = {
    "clip": (transformers.CLIPModel, transformers.CLIPConfig, dict(bos_token_id=58, eos_token_id=59), 0),
    "chinese_clip": (transformers.ChineseCLIPModel, transformers.ChineseCLIPConfig, dict(layer_norm_eps=0.01), 0),
    "altclip": (transformers.AltCLIPModel, transformers.AltCLIPConfig, dict(project_dim=20), 1),
}


@pytest.fixture(autouse=True)
def _same_numbers_each_time():
    torch.manual_seed(0)


def published(kind: str, vision: dict | None = None) -> transformers.PreTrainedModel:
    """A tiny model whose every tensor is drawn at random, so that none can be forgotten unnoticed."""
    model_class, config_class, more, _ = KINDS[kind]
    config = config_class(vision_config=VISION | (vision or {}), text_config=TEXT | more, projection_dim=16)
    model = model_class(config).eval()
    for name, parameter in model.named_parameters():
        if name != "logit_scale":
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def captions(kind: str) -> Tensor:
    pad = KINDS[kind][3]
    tokens = torch.randint(2, VOCAB - 2, (3, 10))
    for row, length in enumerate((4, 8, 3)):
        tokens[row, length:] = pad
        tokens[row, length - 1] = VOCAB - 1
    return tokens


def features(model: transformers.PreTrainedModel, kind: str, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    mask = None if kind == "clip" else (tokens != KINDS[kind][3]).long()
    with torch.no_grad():
        found = model.get_image_features(image), model.get_text_features(tokens, attention_mask=mask)
    return tuple(one if isinstance(one, Tensor) else one.pooler_output for one in found)


def assert_same(model: Clip, reference: transformers.PreTrainedModel, kind: str) -> None:
    image, tokens = torch.randn(3, 3, 16, 16), captions(kind)
    expected = features(reference, kind, image, tokens)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(image), expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.encode_text(tokens), expected[1], atol=1e-5, rtol=1e-5)
    assert model.logit_scale == reference.logit_scale


def load(path: Path) -> Clip:
    return AutoLoader("txt_img_matching", "clip", weights=path, device="cpu").get_model()


# --- reading ---
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_gives_the_same_features(kind: str, activation: str, tmp_path, caplog):
    reference = published(kind, {"hidden_act": activation})
    reference.save_pretrained(tmp_path)
    model = load(tmp_path)
    assert_same(model, reference, kind)
    assert model.config.image.activation == activation
    assert not [record for record in caplog.records if record.name.startswith("zoo")]


@pytest.mark.parametrize(
    ("kind", "block"),
    [("clip", "layers"), *((kind, block) for kind in ("chinese_clip", "altclip") for block in ("layer", "layers"))],
)
def test_an_old_pickle_with_buffers_and_either_name_of_blocks(kind: str, block: str, tmp_path):
    reference = published(kind)
    reference.config.save_pretrained(tmp_path)
    state = {re.sub(r"\.encoder\.layers?\.", f".encoder.{block}.", n): t for n, t in reference.state_dict().items()}
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    state["text_model.embeddings.position_ids"] = torch.arange(CONTEXT)[None]
    torch.save(state, tmp_path / "pytorch_model.bin")
    assert_same(load(tmp_path), reference, kind)


def test_a_config_that_leaves_out_its_defaults(tmp_path):
    """transformers 4 wrote only what differs from its classes' defaults: 12 heads, 8 for text, and quick_gelu."""
    config = transformers.CLIPConfig(
        vision_config=VISION | dict(hidden_size=48, num_attention_heads=12),
        text_config=TEXT | dict(num_attention_heads=8, eos_token_id=59),
        projection_dim=16,
    )
    reference = transformers.CLIPModel(config).eval()
    reference.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    for tower in ("vision_config", "text_config"):
        del written[tower]["num_attention_heads"], written[tower]["hidden_act"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert_same(load(tmp_path), reference, "clip")


@pytest.mark.parametrize(
    ("preprocessor", "resize"),
    [
        ({"size": {"shortest_edge": 16}, "do_center_crop": True}, "shortest"),
        ({"size": 16}, "shortest"),
        ({"size": {"height": 16, "width": 16}}, "squash"),
    ],
)
@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_the_preprocessor_beside_a_model_is_obeyed(name: str, preprocessor: dict, resize: str, tmp_path):
    published("clip").save_pretrained(tmp_path)
    preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2, **preprocessor}
    nested = {"image_processor": preprocessor} if name.startswith("processor") else preprocessor
    (tmp_path / name).write_text(json.dumps(nested))
    transform = AutoLoader("txt_img_matching", "clip", weights=tmp_path).get_transform()
    assert (transform.mean, transform.std) == ((0.5,) * 3, (0.25,) * 3)
    assert (transform.resize, transform.interpolation) == (resize, "bilinear")


@pytest.mark.parametrize(
    ("tower", "field", "value", "message"),
    [
        ("vision_config", "hidden_size", 64, "image.width is 32 by the shapes .* and 64 by config.json"),
        ("text_config", "num_hidden_layers", 2, "text.depth is 3 by the shapes .* and 2 by config.json"),
        ("text_config", "layer_norm_eps", 1e-6, "layer_norm_eps is 1e-06"),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(tower, field, value, message, tmp_path):
    published("clip").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config[tower][field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsMismatch, match=message):
        load(tmp_path)


# --- writing ---
CONFIGS = {
    "clip": ClipConfig(
        embed=16,
        image=VitConfig(size=16, patch=8, width=32, depth=2, heads=4, activation="gelu"),
        text=TextConfig(context=CONTEXT, vocab=VOCAB, width=32, depth=2, heads=2, mlp_ratio=2.0, activation="gelu"),
    ),
    "chinese_clip": ClipConfig(
        embed=16,
        image=VitConfig(size=16, patch=8, width=32, depth=2, heads=4),
        text=BertConfig(vocab=VOCAB, width=32, depth=2, heads=2, positions=CONTEXT, context=CONTEXT),
        resize="squash",
    ),
    "altclip": ClipConfig(
        embed=16,
        image=VitConfig(size=16, patch=8, width=32, depth=2, heads=4),
        text=BertConfig(
            vocab=VOCAB, width=32, depth=2, heads=2, positions=14, context=CONTEXT,
            first_position=2, pad=1, types=1, eps=1e-5, bridge=20,
        ),
    ),
}  # fmt: skip


def export(model: Clip, folder: Path) -> None:
    sizes = dataclasses.asdict(model.config)
    state, config = clip.to_hugging_face(model.state_dict(), sizes)
    weights.write(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(clip.to_hugging_face_preprocessor(sizes)))


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_zoo_writes(kind: str, tmp_path):
    model = Clip(CONFIGS[kind]).eval()
    export(model, tmp_path)
    reference, report = KINDS[kind][0].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same(model, reference.eval(), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_zoo_reads_back_all_that_it_writes(kind: str, tmp_path):
    model = Clip(CONFIGS[kind]).eval()
    export(model, tmp_path)
    back = load(tmp_path)
    assert back.config == model.config
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_the_preprocessor_that_zoo_writes_is_that_of_transformers(tmp_path):
    from PIL import Image

    config = dataclasses.replace(CONFIGS["clip"], mean=(0.4, 0.5, 0.6))
    export(Clip(config), tmp_path)
    picture = Image.effect_noise((40, 30), 60).convert("RGB")
    processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    ours = AutoLoader("txt_img_matching", "clip", weights=tmp_path).get_transform()(picture)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIGS["clip"], image=ResNetConfig(size=32, layers=(1, 1, 1, 1), width=4)),
        dataclasses.replace(CONFIGS["clip"], loss="sigmoid"),
    ],
    ids=["resnet", "sigmoid"],
)
def test_what_transformers_has_no_class_for_is_refused(config: ClipConfig):
    with pytest.raises(WeightsMismatch, match="Hugging Face layout has no name"):
        clip.to_hugging_face(Clip(config).state_dict(), dataclasses.asdict(config))


def test_a_chinese_clip_is_written_in_its_own_layout_and_an_altclip_is_not():
    model = Clip(CONFIGS["chinese_clip"])
    state = clip.to_openai(model.state_dict(), dataclasses.asdict(model.config))
    assert {"bert.embeddings.word_embeddings.weight", "visual.proj", "text_projection"} <= state.keys()
    back, _ = clip.to_ours(state, dataclasses.asdict(model.config))
    assert all(torch.equal(back[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(WeightsMismatch, match="no name for text.bridge"):
        clip.to_openai(Clip(CONFIGS["altclip"]).state_dict(), {})
