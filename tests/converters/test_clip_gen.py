"""The release of CLIP-GEN: three files, whose transformer is written here from torch's own layers over its names."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import weights
from zoo.converters.clip import to_openai
from zoo.converters.clip_gen import to_ours
from zoo.errors import WeightsMismatch
from zoo.models.clip import Clip, ClipConfig, TextConfig, VitConfig
from zoo.models.clip_gen import ClipGen, ClipGenConfig
from zoo.models.clip_gen_transformer import ClipGenTransformerConfig
from zoo.models.vqgan import Vqgan, VqganConfig

VQGAN = VqganConfig(
    size=8,
    widths=(32, 32),
    blocks=1,
    attention=(1,),
    latent=6,
    vocab=12,
    code_width=6,
    codebook=0.25,
    commitment=1.0,
)
CLIP = ClipConfig(
    embed=10,
    image=VitConfig(size=8, patch=4, width=64, depth=1, heads=1),
    text=TextConfig(context=7, vocab=30, width=64, depth=1, heads=1),
)
HEADS, DEPTH, WIDTH = 2, 3, 128  # heads of 64, as published


class Layer(nn.Module):
    """models/gpt.py, Block."""

    def __init__(self, length: int):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, activation=F.gelu, batch_first=True, norm_first=True
        )
        self.register_buffer("mask", torch.ones(length, length).triu(1).bool())  # true is hidden


class Gpt(nn.Module):
    """models/gpt.py: the embedding at place 0, and code t at place t + 1."""

    def __init__(self, vocab: int = 12, length: int = 16, embed: int = 10):
        super().__init__()
        self.tok_emb = nn.Embedding(vocab, WIDTH)
        self.pos_emb = nn.Parameter(torch.zeros(1, length, WIDTH))
        self.cond_proj = nn.Linear(embed, WIDTH)
        self.blocks = nn.ModuleList(Layer(length) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocab)

    def forward(self, embedding: Tensor, codes: Tensor) -> Tensor:
        x = torch.cat([self.cond_proj(embedding)[:, None], self.tok_emb(codes[:, :-1])], 1) + self.pos_emb
        for block in self.blocks:
            x = block.encoder(x, src_mask=block.mask)
        return self.head(self.norm(x))


def drawn_at_random(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def published(gpt: Gpt | None = None) -> dict[str, Tensor]:
    """The three files as AutoLoader reads a card with parts; VQGAN's own layout has its own tests."""
    clip, vqgan = drawn_at_random(Clip(CLIP)), drawn_at_random(Vqgan(VQGAN))
    gpt = gpt or drawn_at_random(Gpt())
    words = to_openai(clip.state_dict(), dataclasses.asdict(CLIP))
    return below("clip.", words) | below("vqgan.model.", vqgan.state_dict()) | gpt.state_dict()


def loaded(state: dict[str, Tensor], config: dict) -> ClipGen:
    state, config = to_ours(state, config)
    return weights.load(ClipGen(ClipGenConfig.from_dict(config)), state).eval()


SAID = {"image": {"size": 8}}


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_releases_transformer_computes_what_torchs_layers_do(wrapped, tmp_path):
    gpt = drawn_at_random(Gpt())
    training = {"epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}}
    torch.save({"model": gpt.state_dict(), **training} if wrapped else gpt.state_dict(), tmp_path / "gpt_coco.pt")
    others = {name: t for name, t in published().items() if name.startswith(("clip.", "vqgan."))}
    model = loaded(others | weights.read(tmp_path / "gpt_coco.pt"), SAID)
    sizes = ClipGenTransformerConfig(embed=10, vocab=12, grid=4, width=WIDTH, depth=DEPTH, heads=HEADS)
    assert model.config.transformer == sizes
    embedding, codes = torch.randn(3, 10), torch.randint(12, (3, 16))
    expected = gpt(embedding, codes)
    assert expected.std() > 0.1
    torch.testing.assert_close(model.transformer.logits(embedding, codes), expected, atol=1e-5, rtol=1e-5)


def test_its_clip_and_vqgan_are_those_of_their_files_and_its_clip_has_openais_gelu(caplog):
    with caplog.at_level(logging.WARNING):
        model = loaded(published(), SAID)
    assert not caplog.records and model.config.image == VQGAN
    assert model.config.clip == CLIP
    for part, expected in ((model.clip, Clip(CLIP)), (model.vqgan, Vqgan(VQGAN))):
        state = drawn_at_random(expected).state_dict()
        assert part.state_dict().keys() == state.keys()
        assert all(torch.equal(part.state_dict()[name], tensor) for name, tensor in state.items())


def test_every_tensor_of_the_transformer_is_asked_for_and_no_other_one_taken():
    state = published()
    for name in Gpt().state_dict():
        if not name.startswith(("blocks.0", "blocks.1")) and not name.endswith(".mask"):
            with pytest.raises(WeightsMismatch):
                loaded({other: tensor for other, tensor in state.items() if other != name}, SAID)
    for name in ("blocks.0.encoder.self_attn.bias_k", "blocks.1.encoder.norm3.weight", "ln_f.weight", "clip.more"):
        with pytest.raises(WeightsMismatch, match=f"1 are left over: {name}"):
            loaded(state | {name: torch.zeros(1)}, SAID)


def test_what_shapes_cannot_tell_is_believed_and_else_not_guessed():
    found = to_ours(published(), {**SAID, "transformer": {"heads": 8, "dropout": 0.1}, "guidance": 2.0})[1]
    assert (found["transformer"]["heads"], found["transformer"]["dropout"], found["guidance"]) == (8, 0.1, 2.0)
    narrow = published()
    for name in ("tok_emb.weight", "cond_proj.weight"):
        narrow[name] = torch.zeros(12, 96) if name[0] == "t" else torch.zeros(96, 10)
    with pytest.raises(WeightsMismatch, match="how many heads a transformer of width 96"):
        to_ours(narrow, SAID)


@pytest.mark.parametrize("part,name", [("clip.", "CLIP"), ("vqgan.", "VQGAN")])
def test_a_release_without_one_of_its_files_says_which(part, name):
    state = {key: tensor for key, tensor in published().items() if not key.startswith(part)}
    with pytest.raises(WeightsMismatch, match=f"lacks its {name}: name the folder that holds clip_vit_b32.pt, vqgan_"):
        to_ours(state, SAID)


def test_weights_of_another_kind_are_refused_by_name():
    for state in ({"visual.proj": torch.zeros(1)}, below("clip.", Clip(CLIP).state_dict()), {}):
        with pytest.raises(WeightsMismatch, match="are not a CLIP-GEN's transformer as HFAiLab published it"):
            to_ours(state, SAID)


def test_our_own_layout_is_left_as_it_is_and_needs_its_config(tmp_path: Path):
    config = ClipGenConfig(
        clip=dataclasses.replace(CLIP, mean=(0.5, 0.4, 0.3)),
        image=dataclasses.replace(VQGAN, quantizer="cosine"),
        transformer=ClipGenTransformerConfig(embed=10, vocab=12, grid=4, width=12, depth=2, heads=3, dropout=0.2),
        **dict(condition_dropout=0.1, noise=0.2, code_dropout=0.3, embedding_weight=0.4, guidance=2.0),
    )
    model = drawn_at_random(ClipGen(config))
    state, said = to_ours(model.state_dict(), json.loads(json.dumps(dataclasses.asdict(config))))
    assert ClipGenConfig.from_dict(said) == config
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(WeightsMismatch, match="config.json"):
        to_ours(model.state_dict(), {})
