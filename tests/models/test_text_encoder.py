"""The text towers equal transformers' to rounding, at every token, padding too."""

from __future__ import annotations

import re
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from zoo.errors import SettingsError
from zoo.models import text_encoder
from zoo.models.clip import TextConfig
from zoo.models.text_encoder import (
    BertTextConfig,
    BertTextEncoder,
    ClipTextEncoder,
    LdmTextConfig,
    build_text,
    text_config,
)

OPENAI = TextConfig(context=11, vocab=60, width=32, depth=3, heads=4)
OPENCLIP = replace(OPENAI, activation="gelu")
CLIP_L = TextConfig(width=768, heads=12)
OPENCLIP_H = TextConfig(width=1024, depth=23, heads=16, activation="gelu")
XLMR = BertTextConfig(
    vocab=60, width=32, depth=3, heads=4, positions=20, first_position=2, types=1, pad=1, eps=1e-5, bridge=24
)
M18 = replace(XLMR, penultimate=True, norm=True)
BERT = BertTextConfig(vocab=60, width=32, depth=2, heads=4, positions=20, masked=False)
RULES = [
    (r"encoder\.layers?\.", "blocks."),
    (r"embeddings\.(word|token)_embeddings?\.", "embed."),
    (r"embeddings\.position_embeddings?\.", "positions."),
    (r"embeddings\.token_type_embeddings\.", "types."),
    (r"embeddings\.LayerNorm", "norm_in"),
    (r"final_layer_norm", "norm_out"),
    (r"attention\.self\.|self_attn\.(?=[qkv])", "attention."),
    (r"attention\.output\.dense|self_attn\.out_proj", "attention.out"),
    (r"attention\.output\.LayerNorm|layer_norm1", "norm1"),
    (r"intermediate\.dense|mlp\.fc1", "mlp.up"),
    (r"output\.dense|mlp\.fc2", "mlp.down"),
    (r"output\.LayerNorm|layer_norm2", "norm2"),
]


def renamed(theirs: nn.Module) -> dict[str, Tensor]:
    """transformers' state with our names; queries, keys and values, each a matrix there, one after the other."""
    made: dict[str, Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        for pattern, new in RULES:
            name = re.sub(pattern, new, name)
        made[name] = tensor
    for name in [name for name in made if re.search(r"\.(query|q_proj)\.", name)]:
        keys = ("query", "key", "value") if ".query." in name else ("q_proj", "k_proj", "v_proj")
        parts = [made.pop(name.replace(keys[0], key)) for key in keys]
        made[name.replace(keys[0], "qkv")] = torch.cat(parts)
    return made


def spread(model: nn.Module, std: float = 0.3) -> nn.Module:
    """No weight is one that a mistake would not show in."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.eval()


def their_clip(config: TextConfig, depth: int, std: float = 0.3) -> nn.Module:
    return spread(
        transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=config.vocab,
                hidden_size=config.width,
                intermediate_size=4 * config.width,
                num_hidden_layers=depth,
                num_attention_heads=config.heads,
                max_position_embeddings=config.context,
                hidden_act=config.activation,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        std,
    )


def our_clip(config: TextConfig, theirs: nn.Module) -> ClipTextEncoder:
    tower, state = ClipTextEncoder(config).eval(), renamed(theirs)
    state = {re.sub(r"^blocks", "transformer.blocks", name): tensor for name, tensor in state.items()}
    state["positions"] = state.pop("positions.weight")
    tower.load_state_dict(state)
    return tower


def their_bert(config: BertTextConfig) -> nn.Module:
    sizes = dict(
        vocab_size=config.vocab,
        hidden_size=config.width,
        intermediate_size=4 * config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        max_position_embeddings=config.positions,
        type_vocab_size=config.types,
        pad_token_id=config.pad,
        layer_norm_eps=config.eps,
        hidden_act="gelu",
    )
    if config.first_position:
        model = transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**sizes), add_pooling_layer=False)
    else:
        model = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    return spread(model)


def our_bert(config: BertTextConfig, theirs: nn.Module) -> BertTextEncoder:
    """Its norm and its linear layer after the blocks are not in transformers' tower and stay as they are drawn."""
    tower = spread(BertTextEncoder(config))
    own = {name: w for name, w in tower.state_dict().items() if name.startswith(("bridge.", "norm_out."))}
    tower.load_state_dict(own | renamed(theirs))
    return tower


def tokens(pad: int) -> Tensor:
    """Captions of 11, 3 and 6 tokens."""
    torch.manual_seed(1)
    found = torch.randint(2, 60, (3, 11))
    found[1, 3:], found[2, 6:] = pad, pad
    return found


@torch.no_grad()
@pytest.mark.parametrize("config", [OPENAI, OPENCLIP], ids=["OpenAI", "OpenCLIP"])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clips_tower_gives_the_context_that_transformers_gives(config: TextConfig, skip: int):
    theirs, given = their_clip(config, config.depth), tokens(pad=0)
    states = theirs(given, output_hidden_states=True).hidden_states
    expected = theirs.final_layer_norm(states[-1 - skip])
    if not skip:
        torch.testing.assert_close(expected, theirs(given).last_hidden_state)
    torch.testing.assert_close(our_clip(config, theirs)(given, skip), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_captions_shorter_than_the_context_need_no_padding():
    tower = our_clip(OPENAI, their_clip(OPENAI, 3))
    given = tokens(pad=0)
    torch.testing.assert_close(tower(given[:, :5]), tower(given)[:, :5])  # it is causal


def test_what_clips_tower_cannot_do_is_refused():
    tower = ClipTextEncoder(OPENAI)
    with pytest.raises(SettingsError, match="12 tokens, and this text tower reads 11"):
        tower(torch.zeros(1, 12, dtype=torch.int64))
    with pytest.raises(SettingsError, match="skip=3: this text tower has 3 blocks"):
        tower(torch.zeros(1, 4, dtype=torch.int64), skip=3)


@torch.no_grad()
@pytest.mark.parametrize("skip", [0, 1])
def test_altdiffusions_tower_is_xlm_roberta_and_a_linear_layer(skip: int):
    theirs = their_bert(XLMR)
    ours, given = our_bert(XLMR, theirs), tokens(pad=1)
    states = theirs(given, attention_mask=(given != 1).long(), output_hidden_states=True).hidden_states
    expected = F.linear(states[-1 - skip], ours.bridge.weight, ours.bridge.bias)
    assert ours.width == 24 and expected.shape == (3, 11, 24)
    torch.testing.assert_close(ours(given, skip), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_that_of_altdiffusion_m18_reads_before_the_last_block_and_norms():
    theirs = their_bert(M18)
    ours, given = our_bert(M18, theirs), tokens(pad=1)
    states = theirs(given, attention_mask=(given != 1).long(), output_hidden_states=True).hidden_states
    normed = F.layer_norm(states[-2], (32,), ours.norm_out.weight, ours.norm_out.bias, 1e-5)
    expected = F.linear(normed, ours.bridge.weight, ours.bridge.bias)
    torch.testing.assert_close(ours(given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("config", [CLIP_L, OPENCLIP_H], ids=["CLIP-L", "OpenCLIP-H"])
def test_at_full_size_it_gives_what_transformers_gives(config: TextConfig):
    theirs = their_clip(config, config.depth, std=0.05)
    given = torch.randint(config.vocab, (2, config.context))
    expected = theirs(given).last_hidden_state
    assert expected.std() > 0.03
    torch.testing.assert_close(our_clip(config, theirs)(given), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_taiyis_tower_is_bert_that_reads_padding_too():
    theirs, given = their_bert(BERT), tokens(pad=0)
    expected = theirs(given).last_hidden_state
    torch.testing.assert_close(our_bert(BERT, theirs)(given), expected, rtol=1e-5, atol=1e-5)
    masked = replace(BERT, masked=True)
    expected = theirs(given, attention_mask=(given != 0).long()).last_hidden_state
    torch.testing.assert_close(our_bert(masked, theirs)(given), expected, rtol=1e-5, atol=1e-5)


def test_the_config_tells_which_tower_it_is():
    for config, kind in ((OPENAI, ClipTextEncoder), (M18, BertTextEncoder)):
        assert text_config(asdict(config)) == config
        assert type(build_text(config)) is kind


LDM = LdmTextConfig(context=9, vocab=60, width=24, depth=3, heads=2, head_width=8)


@pytest.mark.parametrize("config", [OPENAI, XLMR, LDM], ids=["CLIP", "XLM-R", "LDM"])
def test_activations_computed_again_give_the_same_gradients(config, monkeypatch):
    tower, given, again = spread(build_text(config)).train(), tokens(pad=1)[:, :9], []
    recompute = text_encoder.recompute
    monkeypatch.setattr(text_encoder, "recompute", lambda *inputs: again.append(1) or recompute(*inputs))
    gradients = []
    for tower.checkpointing in (False, True):
        tower.zero_grad()
        tower(given).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None})
        assert len(again) == (config.depth if tower.checkpointing else 0)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_all_that_is_trained_gets_a_gradient_also_where_the_last_block_is_left_out():
    tower = build_text(M18).requires_grad_(False).requires_grad_(True)
    tower(tokens(pad=1)).sum().backward()
    trained = [name for name, p in tower.named_parameters() if p.requires_grad]
    assert len(trained) > 30 and all(tower.get_parameter(name).grad is not None for name in trained)
    assert not any(name.startswith("blocks.2.") for name in trained)
    assert all(p.requires_grad for p in build_text(XLMR).requires_grad_(True).parameters())


@pytest.mark.parametrize(
    ("config", "tensors", "parameters"),
    [
        (CLIP_L, 148, 123_060_480),
        (OPENCLIP_H, 280, 340_387_840),
    ],
    ids=["CLIP-L", "OpenCLIP-H"],
)
def test_the_published_sizes_have_the_published_numbers_of_parameters(config: TextConfig, tensors, parameters):
    with torch.device("meta"):
        state = build_text(config).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == parameters
    assert len(state) == tensors  # queries, keys and values are one, where published files have 196 and 372
