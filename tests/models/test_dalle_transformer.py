"""The transformer against a reference written from the paper's words, one token at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.blocks.grid_attention import whole_mask
from zoo.errors import SettingsError
from zoo.models.dalle_transformer import DalleTransformer, TransformerConfig

TINY = TransformerConfig(
    text_vocab=20, text_length=5, vocab=12, grid=4, width=16, depth=5, heads=4, kernel=3, head_bias=True
)
VARIANTS = {
    "paper": TINY,
    "full": replace(TINY, attention="full", positions="flat", pads=False, head_bias=False),
    "sandwich": replace(TINY, norm="sandwich", conv="conv_clamped", head_norm=True, activation="gelu_tanh"),
}


def build(config: TransformerConfig) -> DalleTransformer:
    torch.manual_seed(0)
    model = DalleTransformer(config)
    for parameter in model.parameters():  # also gains and biases, so that none can be left out unseen
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(config: TransformerConfig, n: int = 2) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    text = torch.randint(1, config.text_vocab, (n, config.text_length))
    text[0, 3:] = 0
    return text, torch.randint(config.vocab, (n, config.grid**2))


def slow(model: DalleTransformer, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of text and image tokens of one sample, from the state dict."""
    config, w = model.config, model.state_dict()
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)  # noqa: E731
    stream = []
    for place, token in enumerate(text.tolist()):
        token = config.text_vocab + place if config.pads and token == 0 else token
        stream.append(w["text.weight"][token] + w["text_positions.weight"][place])
    for place, code in enumerate(codes.tolist()):
        where = (
            w["places.weight"][place]
            if config.positions == "flat"
            else w["rows.weight"][place // config.grid] + w["columns.weight"][place % config.grid]
        )
        stream.append(w["image.weight"][code] + where)
    x = torch.stack(stream)
    for i, pattern in enumerate(config.patterns):
        mask = whole_mask(pattern, config.text_length, config.grid, config.kernel)  # drawn by hand in its own test
        q, k, v = linear(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.qkv").chunk(3, -1)
        heads = []
        for q_h, k_h, v_h in zip(*(part.chunk(config.heads, -1) for part in (q, k, v)), strict=True):
            scores = (q_h @ k_h.T / q_h.shape[-1] ** 0.5).masked_fill(~mask, float("-inf"))
            heads.append(scores.softmax(-1) @ v_h)
        added = linear(torch.cat(heads, -1), f"blocks.{i}.out")
        x = x + (norm(added, f"blocks.{i}.after1") if config.norm == "sandwich" else added)
        hidden = linear(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.mlp.up")
        hidden = F.gelu(hidden, approximate="tanh" if config.activation == "gelu_tanh" else "none")
        added = linear(hidden, f"blocks.{i}.mlp.down")
        x = x + (norm(added, f"blocks.{i}.after2") if config.norm == "sandwich" else added)
    x = norm(x, "norm")
    x = norm(x, "head_norm") if config.head_norm else x
    last = config.text_length - 1
    return linear(x[:last], "text_head"), linear(x[last:-1], "image_head")


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_loss_equal_the_papers_words(name):
    config = VARIANTS[name]
    model = build(config)
    text, codes = batch(config)
    with torch.no_grad():
        text_logits, image_logits = model.logits(text, codes)
        found = model(text, codes)
    text_terms, image_terms = [], []
    for i in range(2):
        slow_text, slow_image = slow(model, text[i], codes[i])
        torch.testing.assert_close(text_logits[i], slow_text, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(image_logits[i], slow_image, atol=1e-5, rtol=1e-5)
        text_terms += [-slow_text[j].log_softmax(-1)[text[i, j + 1]] for j in range(config.text_length - 1)]
        image_terms += [-slow_image[j].log_softmax(-1)[codes[i, j]] for j in range(config.grid**2)]
    text_loss, image_loss = (float(sum(terms)) / len(terms) for terms in (text_terms, image_terms))
    assert float(found["text"]) == pytest.approx(text_loss, rel=1e-5)
    assert float(found["image"]) == pytest.approx(image_loss, rel=1e-5)
    assert float(found["loss"]) == pytest.approx(text_loss / 8 + 7 * image_loss / 8, rel=1e-5)


def test_the_papers_sizes_have_twelve_billion_parameters():
    from zoo.weights import blank

    config = TransformerConfig()
    with blank(), torch.device("meta"):
        params = sum(p.numel() for p in DalleTransformer(config).parameters())
    assert 12.2e9 < params < 12.4e9
    assert (config.width // config.heads, config.text_length + config.grid**2) == (64, 1280)


def test_padding_has_an_embedding_for_each_position():
    model = build(TINY)
    pads = model.embed_text(torch.zeros(1, 5, dtype=torch.int64))[0] - model.text_positions.weight
    torch.testing.assert_close(pads, model.text.weight[TINY.text_vocab :])


def test_no_token_sees_a_later_one():
    model = build(TINY)
    text, codes = batch(TINY, 1)
    with torch.no_grad():
        before = model.logits(text, codes)[1]
        for place in range(TINY.grid**2):
            changed = codes.clone()
            changed[0, place] = (changed[0, place] + 1) % TINY.vocab
            after = model.logits(text, changed)[1]
            torch.testing.assert_close(after[:, : place + 1], before[:, : place + 1])
            assert place == TINY.grid**2 - 1 or not torch.allclose(after[:, place + 1], before[:, place + 1])


def test_accumulated_halves_equal_the_whole_batch():
    model = build(TINY)
    text, codes = batch(TINY, 4)
    model(text, codes)["loss"].backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        (model(text[half], codes[half])["loss"] / 2).backward()
    for a, b in zip(whole, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad, atol=1e-6, rtol=1e-4)


def test_recomputing_activations_changes_no_gradient():
    model = build(TINY)
    found = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        model.zero_grad()
        model(*batch(TINY))["loss"].backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(SettingsError, match="heads"):
        TransformerConfig(width=10, heads=4)
    with pytest.raises(SettingsError, match="attention"):
        TransformerConfig(attention="dense")


def test_weights_begin_at_a_fiftieth_and_smaller_where_they_are_added_to_the_stream():
    torch.manual_seed(0)
    sizes = {"text_vocab": 99, "text_length": 9, "vocab": 99, "grid": 3, "width": 128, "depth": 8, "heads": 4}
    model = DalleTransformer(TransformerConfig(**sizes, kernel=3))
    added = ("out.weight", "down.weight")
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and weight.numel() > 9_000:
            assert float(weight.std()) == pytest.approx(0.005 if name.endswith(added) else 0.02, rel=0.05), name
        elif name.endswith("bias"):
            assert not weight.any(), name
