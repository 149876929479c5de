"""A model whose weights wait elsewhere draws the same pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import nn

from zoo.generation.tokens import Sampling
from zoo.models.dalle import Dalle, DalleConfig
from zoo.models.dalle_transformer import TransformerConfig
from zoo.models.dvae import DvaeConfig
from zoo.optimization import dispatch

CONFIG = DalleConfig(
    image=DvaeConfig(size=32, vocab=16, hidden=8, stem=4, groups=3, blocks=1),
    transformer=TransformerConfig(text_vocab=20, text_length=5, vocab=16, grid=8, width=16, depth=3, heads=2, kernel=3),
)


@pytest.mark.parametrize("where", ["host", "disk"])
def test_weights_that_come_when_their_layer_runs_draw_the_same(where: str, tmp_path: Path):
    torch.manual_seed(0)
    model = Dalle(CONFIG).eval()
    text = torch.tensor([[3, 4, 0, 0, 0]] * 2 + [[5, 6, 7, 0, 0]] * 2)
    words = {"seeds": [1, 2, 1, 2], "sampling": Sampling(guidance=2.0)}
    with torch.inference_mode():
        expected = model.draw(text, **words)
        pictures = model.dvae.decode(expected)
        if where == "host":
            cpu_offload(model, torch.device("cpu"))
        else:
            disk_offload(model, tmp_path, torch.device("cpu"))
        assert all(p.is_meta for p in model.parameters())
        assert torch.equal(model.draw(text, **words), expected)
        assert torch.equal(model.dvae.decode(expected), pictures)


def test_without_a_gpu_there_is_nothing_to_spread_over(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = nn.Linear(2, 2)
    assert dispatch(model) is model and not hasattr(model, "_hf_hook")


def test_the_loader_spreads_when_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    import zoo.optimization
    from zoo import AutoLoader

    asked = []
    monkeypatch.setattr(zoo.optimization, "dispatch", lambda model: asked.append(model) or model)
    for device in ("auto", "cpu"):
        model = AutoLoader("img_tokenizing", "dvae-emoji-tiny", device=device).get_model()
    assert len(asked) == 1 and asked[0] is not model


def test_what_does_not_fit_the_gpu_waits_on_the_host_and_no_block_is_cut(monkeypatch: pytest.MonkeyPatch):
    model, told = Dalle(CONFIG), {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("accelerate.dispatch_model", lambda model, places, **words: told.update(places=places, **words))
    block = 4 * sum(p.numel() for p in model.transformer.blocks[0].parameters())
    rest = 4 * sum(p.numel() for p in model.parameters()) - 3 * block
    dispatch(model, {0: rest + 2 * block, "cpu": 0})
    places = told["places"]
    assert told["main_device"] == 0 and set(places.values()) == {0, "cpu"}
    assert all(not name.startswith("transformer.blocks.") or name.count(".") == 2 for name in places)
