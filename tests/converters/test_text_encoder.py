"""Text towers of transformers, open_clip and AltDiffusion with random weights load strictly and give what they gave."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import (
    RobertaSeriesConfig,
    RobertaSeriesModelWithTransformation,
)
from torch import Tensor, nn

from zoo import weights
from zoo.converters.text_encoder import to_compvis, to_ours, to_transformers
from zoo.errors import WeightsMismatch
from zoo.models.clip import TextConfig
from zoo.models.text_encoder import build_text, text_config

SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.tensor([[57, 3, 9, 58, 58], [57, 4, 58, 58, 58]])
PADDED = torch.tensor([[0, 3, 9, 8, 2], [0, 4, 2, 1, 1]])


def spread(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, 1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, 0.2)
    return model.eval()


def clip(**sizes) -> transformers.CLIPTextModel:
    config = transformers.CLIPTextConfig(**SIZES | {"max_position_embeddings": 11} | sizes)
    return spread(transformers.CLIPTextModel(config))


def bert() -> transformers.BertModel:
    return spread(transformers.BertModel(transformers.BertConfig(**SIZES, max_position_embeddings=20)))


def alt(pre: bool = False) -> RobertaSeriesModelWithTransformation:
    more = {"project_dim": 24, "has_pre_transformation": pre, "max_position_embeddings": 20, "type_vocab_size": 1}
    return spread(RobertaSeriesModelWithTransformation(RobertaSeriesConfig(**SIZES, **more, layer_norm_eps=1e-5)))


def loaded(state: dict[str, Tensor], config: dict) -> nn.Module:
    ours, sizes = to_ours(state, config)
    with weights.blank():
        model = build_text(text_config(sizes))
    return weights.load(model, ours).eval()


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def bare(model: nn.Module) -> dict[str, Tensor]:
    """A CLIPTextModel's tensors without the prefix, which transformers has in some versions."""
    return {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}


def open_clip(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """transformers' tensors under open_clip's names, and a last block and a projection that nothing reads."""
    made = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
    }
    for number in range(depth):
        theirs, at = f"encoder.layers.{number}.", f"transformer.resblocks.{number}."
        for kind in ("weight", "bias"):
            joined = [state[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            made[f"{at}attn.in_proj_{kind}"] = torch.cat(joined)
            for a, b in (("attn.out_proj", "self_attn.out_proj"), ("ln_1", "layer_norm1"), ("ln_2", "layer_norm2")):
                made[f"{at}{a}.{kind}"] = state[f"{theirs}{b}.{kind}"]
            for a, b in (("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
                made[f"{at}{a}.{kind}"] = state[f"{theirs}{b}.{kind}"]
    return made


def with_unused(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    last = {n.replace(f".{depth - 1}.", f".{depth}."): t + 1 for n, t in state.items() if f".{depth - 1}." in n}
    return state | last | {"text_projection": torch.zeros(32, 8), "logit_scale": torch.zeros(())}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], tensor) for name, tensor in b.items())


# --- CLIP's ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("prefix", ["", "text_model.", "transformer.text_model.", "cond_stage_model.transformer."])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_a_tower_of_transformers_gives_what_it_gave_under_any_prefix(prefix, activation):
    theirs = clip(hidden_act=activation)
    state = below(prefix, bare(theirs)) | {f"{prefix}embeddings.position_ids": torch.arange(11)[None]}
    ours = loaded(state, theirs.config.to_dict())
    expected = TextConfig(context=11, vocab=60, width=32, depth=2, heads=4, mlp_ratio=2.0, activation=activation)
    assert ours.config == expected
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).last_hidden_state, atol=1e-5, rtol=1e-4)


def test_transformers_files_come_back(tmp_path):
    theirs = clip()
    back, config = to_transformers(*to_ours(bare(theirs), theirs.config.to_dict()))
    assert same(back, below("text_model.", bare(theirs)))
    theirs.config.from_dict(config).save_pretrained(tmp_path)
    weights.write(back, tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = transformers.CLIPTextModel.from_pretrained(tmp_path)
    assert same(again.state_dict(), theirs.state_dict())
    for name in (*SIZES, "hidden_act", "max_position_embeddings", "layer_norm_eps"):
        assert getattr(again.config, name) == getattr(theirs.config, name)


@pytest.mark.parametrize("prefix", ["", "model.", "cond_stage_model.model."])
@torch.no_grad()
def test_open_clips_last_block_and_projection_are_left_out(prefix):
    theirs = clip(hidden_act="gelu")
    file = open_clip(bare(theirs), 2)
    ours = loaded(below(prefix, with_unused(file, 2)), {"heads": 4})
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).last_hidden_state, atol=1e-5, rtol=1e-4)
    back = to_compvis(ours.state_dict(), dataclasses.asdict(ours.config))
    assert same(back, below("model.", file))
    assert same(loaded(back, {"heads": 4}).state_dict(), ours.state_dict())  # nothing is left out twice


def test_openais_tower_is_written_by_compvis_names():
    theirs = clip()
    assert same(to_compvis(*to_ours(bare(theirs), {})), below("transformer.text_model.", bare(theirs)))


@pytest.mark.parametrize("config", [{"layer_norm_eps": 1e-6}])
def test_a_tower_that_computes_otherwise_is_refused(config):
    with pytest.raises(WeightsMismatch, match="layer_norm_eps=1e-06"):
        to_ours(bare(clip()), config)


def test_the_full_size_towers_have_the_published_tensors():
    """196 of version 1, 372 of version 2."""
    for config, count, params in (
        (TextConfig(width=768, depth=12, heads=12), 196, 123_060_480),
        (TextConfig(width=1024, depth=23, heads=16, activation="gelu"), 372, 340_387_840),
    ):
        with torch.device("meta"):
            ours = build_text(config).state_dict()
        theirs, sizes = to_transformers(ours, dataclasses.asdict(config))
        assert len(theirs) == count and sum(tensor.numel() for tensor in theirs.values()) == params
        assert text_config(to_ours(theirs, sizes)[1]) == config


# --- BERT and XLM-RoBERTa ---------------------------------------------------------------------------------------------
@torch.no_grad()
def test_taiyis_bert_gives_what_it_gave_without_a_mask():
    theirs = bert()
    ours = loaded(theirs.state_dict(), theirs.config.to_dict())
    assert (ours.config.pad, ours.config.eps, ours.config.masked) == (0, 1e-12, False)
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).last_hidden_state, atol=1e-5, rtol=1e-4)
    back, config = to_transformers(ours.state_dict(), dataclasses.asdict(ours.config))
    rest = {n: t for n, t in theirs.state_dict().items() if not n.startswith("pooler.") and "_ids" not in n}
    assert same(back, {n.replace(".layers.", ".layer."): t for n, t in rest.items()})
    assert config["type_vocab_size"] == 2


@pytest.mark.parametrize("pre", [False, True])
@torch.no_grad()
def test_altdiffusions_towers_give_what_they_gave_with_the_mask(pre):
    theirs = alt(pre)
    ours = loaded(theirs.state_dict(), theirs.config.to_dict())
    assert (ours.config.first_position, ours.config.bridge, ours.config.penultimate) == (2, 24, pre)
    expected = theirs(PADDED, attention_mask=(PADDED != 1).long()).projection_state
    torch.testing.assert_close(ours(PADDED), expected, atol=1e-5, rtol=1e-4)  # at padding too, which the UNet reads
    back, config = to_transformers(ours.state_dict(), dataclasses.asdict(ours.config))
    assert same(loaded(back, config).state_dict(), ours.state_dict())
    assert config["has_pre_transformation"] is pre and config["project_dim"] == 24


# --- ours, and others ------------------------------------------------------------------------------------------------
def test_our_own_layout_is_left_as_it_is():
    for theirs in (clip(), bert(), alt()):
        model = loaded(theirs.state_dict(), theirs.config.to_dict())
        state, sizes = to_ours(model.state_dict(), dataclasses.asdict(model.config))
        assert same(state, model.state_dict()) and text_config(sizes) == model.config
    with pytest.raises(WeightsMismatch, match="config.json must lie beside"):
        to_ours(model.state_dict(), {})


def test_tensors_too_many_or_too_few_are_reported_by_strict_loading():
    state = bare(clip())
    with pytest.raises(WeightsMismatch, match="left over: adapter.weight"):
        loaded(below("text_model.", state) | {"adapter.weight": torch.zeros(1)}, {})
    del state["encoder.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(WeightsMismatch, match=r"missing: transformer.blocks.1.attention.qkv.bias.*left over"):
        loaded(state, {})


def test_weights_of_another_kind_and_what_compvis_lacks_are_refused():
    with pytest.raises(WeightsMismatch, match=r"these 1 tensors \(visual.proj, ...\) are no text tower"):
        to_ours({"visual.proj": torch.zeros(1)}, {})
    with pytest.raises(WeightsMismatch, match="no place for a BERT"):
        to_compvis(*to_ours(bert().state_dict(), {}))
