"""Drawing pictures: every fast path draws, token for token, what the plain one draws."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from PIL import Image

from zoo.errors import CaptionTooLong, SettingsError
from zoo.generation.tokens import Sampling, choose, guide, uniforms
from zoo.models.dalle import Dalle, DalleConfig, prompts_of
from zoo.models.dalle_decoding import Decoding
from zoo.models.dalle_transformer import TransformerConfig
from zoo.models.dvae import Dvae, DvaeConfig

SIZES = TransformerConfig(text_vocab=30, text_length=6, vocab=16, grid=4, width=16, depth=6, heads=2, kernel=3)
IMAGE = DvaeConfig(size=32, vocab=16, hidden=8, stem=8, blocks=1)
VARIANTS = {
    "sparse": SIZES,
    "full": replace(SIZES, attention="full"),
    "torus": replace(SIZES, conv="conv_torus", positions="flat", pads=False),
    "sandwich": replace(SIZES, norm="sandwich", head_norm=True, head_bias=True),
}
GUIDED = Sampling(guidance=3.0)


class Letters:
    """A tokenizer of letters."""

    pad, vocab_size = 0, 30

    def tokenize_as_tensor(self, texts, context_length=6, truncate="end"):
        rows = [[ord(letter) - 96 for letter in text] for text in texts]
        for row in rows:
            if len(row) > context_length:
                raise CaptionTooLong(f"{len(row)} tokens")
        return torch.tensor([row + [0] * (context_length - len(row)) for row in rows])


def build(sizes: TransformerConfig = SIZES, dropout: float = 0.1, **words: float) -> Dalle:
    torch.manual_seed(0)
    config = DalleConfig(image=IMAGE, transformer=sizes, caption_dropout=dropout, **words)
    model = Dalle(config, tokenizer=Letters())
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def text_of(n: int) -> torch.Tensor:
    torch.manual_seed(2)
    text = torch.randint(1, 30, (n, 6))
    text[0, 4:] = 0
    return text


@torch.no_grad()
def plain(model: Dalle, text: torch.Tensor, seeds: list[int], sampling: Sampling) -> torch.Tensor:
    """Without any cache: for each token the whole sequence again, for each row alone, guided by a second pass."""
    found = []
    for row, seed in zip(text, seeds, strict=True):
        numbers, codes = uniforms([seed], 16)[0], torch.zeros(1, 16, dtype=torch.int64)
        for place in range(16):
            logits = model.transformer.logits(row[None], codes)[1][:, place]
            if sampling.guidance != 1:
                without = model.transformer.logits(torch.zeros_like(row[None]), codes)[1][:, place]
                logits = guide(logits, without, sampling.guidance)
            codes[:, place] = choose(logits, numbers[place : place + 1], sampling)
        found.append(codes[0])
    return torch.stack(found).unflatten(1, (4, 4))


@pytest.mark.parametrize("sampling", [Sampling(), GUIDED, Sampling(temperature=0), Sampling(top_k=5, top_p=0.8)])
@pytest.mark.parametrize("name", VARIANTS)
def test_cached_sparse_guided_and_batched_drawing_equals_the_plain_one(name, sampling):
    model = build(VARIANTS[name])
    text = text_of(3).repeat_interleave(2, 0)  # three prompts of two candidates
    seeds = [5, 6, 7, 8, 9, 10]
    with torch.no_grad():
        assert torch.equal(model.draw(text, seeds, sampling), plain(model, text, seeds, sampling))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("without", [None, torch.zeros(1, 6, dtype=torch.int64)])
def test_cached_logits_equal_those_of_the_whole_sequence(name, without):
    model = build(VARIANTS[name]).transformer
    text, codes = text_of(2), torch.randint(16, (6, 16))
    with torch.no_grad():
        whole = model.logits(text.repeat_interleave(3, 0), codes)[1]
        if without is not None:
            whole = guide(whole, model.logits(without.expand(6, -1), codes)[1], 2.5)
        predict = Decoding(model, text, 3, without, 2.5)
        for place in range(16):
            found = predict(codes[:, place - 1] if place else None, place)
            torch.testing.assert_close(found, whole[:, place], atol=1e-5, rtol=1e-5)


# --- three faults of DALLE-pytorch 1.6.6 (reference: found by reading its dalle_pytorch.py) ---------------------------
def count_tokens(model: Dalle) -> list[int]:
    """How many tokens each call of the first block sees."""
    seen: list[int] = []
    model.transformer.blocks[0].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].shape[0] * inputs[0].shape[1])
    )
    return seen


def test_without_guidance_the_cache_is_used_too():
    model = build()
    seen = count_tokens(model)
    with torch.no_grad():
        model.draw(text_of(1), [0])
    assert seen == [6] + [1] * 15


def test_guidance_leaves_the_prompt_as_it_is():
    model, text = build(), text_of(2)
    before = text.clone()
    with torch.no_grad():
        model.draw(text, [0, 1], GUIDED)
        assert torch.equal(text, before)
        with_prompt, other = (model.draw(t, [0, 1], GUIDED) for t in (text, text.flip(0)))
    assert not torch.equal(with_prompt, other)  # the prompt still speaks after the first token


def test_rows_without_prompt_have_a_cache_of_their_own():
    model, text = build(), text_of(1)
    with torch.no_grad():
        decoding = Decoding(model.transformer, text, 1, torch.zeros_like(text), 2.0)
        decoding(None, 0)
        decoding(torch.tensor([3]), 1)
        with_prompt, without = decoding.images[1:, :, :, :, 0].unbind(2)
    assert not torch.allclose(with_prompt, without)


# --- candidates ------------------------------------------------------------------------------------------------------
def test_thirty_two_candidates_read_their_prompt_once():
    model = build()
    seen = count_tokens(model)
    pictures = model.generate("cat", n=32, seed=3, progress=False)
    assert len(pictures) == 1 and len(pictures[0]) == 32
    assert seen == [6] + [32] * 15


def test_a_picture_depends_on_its_prompt_and_seed_and_on_nothing_that_is_drawn_with_it():
    model = build()
    many = model.generate(["cat", "dog", "fox"], n=4, seed=7, progress=False)
    assert many == model.generate(["cat", "dog", "fox"], n=4, seed=7, batch_size=5, progress=False)
    assert many[1][2] == model.generate("dog", seed=9, progress=False)[0][0]
    assert many[1][2] != many[1][1]


def test_neighbours_of_the_same_text_are_one_prompt():
    a, b = text_of(2)
    text, candidates = prompts_of(torch.stack([a, a, b, b]))
    assert candidates == 2 and torch.equal(text, torch.stack([a, b]))
    text, candidates = prompts_of(torch.stack([a, b, b]))
    assert candidates == 1 and len(text) == 3


def test_the_best_of_all_candidates_are_returned_best_first():
    model = build()
    drawn = model.generate("cat", n=6, progress=False)[0]
    brightness = lambda prompt, pictures: [sum(p.convert("L").tobytes()) for p in pictures]  # noqa: E731
    best = model.generate("cat", n=2, candidates=6, rerank=brightness, progress=False)[0]
    assert best == sorted(drawn, key=lambda p: -sum(p.convert("L").tobytes()))[:2]


# --- beginnings and previews -----------------------------------------------------------------------------------------
def test_given_first_rows_are_kept_and_the_rest_is_drawn_after_them():
    model, picture = build(), torch.rand(3, 32, 32)
    codes = model.dvae.encode(picture[None])[0]
    shown = []
    model.generate(
        "cat", n=2, first_rows=(picture, 2), preview=lambda row, so_far: shown.append(so_far), progress=False
    )
    with torch.no_grad():
        found = model.draw(Letters().tokenize_as_tensor(["cat"] * 2), [0, 1], given=codes[:2].flatten())
    assert torch.equal(found[:, :2], codes[:2].expand(2, -1, -1))
    assert not torch.equal(found[0], found[1])
    assert len(shown) == 4
    torch.testing.assert_close(shown[-1], model.dvae.decode(found))


def test_the_preview_shows_the_rows_that_are_drawn_and_grey_below():
    model, shown = build(), {}
    model.generate("cat", preview=lambda row, pictures: shown.__setitem__(row, pictures), progress=False)
    assert list(shown) == [1, 2, 3, 4]
    for row, pictures in shown.items():
        assert (pictures[:, :, row * 8 :] == 0.5).all() and not (pictures[:, :, : row * 8] == 0.5).all()


# --- training --------------------------------------------------------------------------------------------------------
def test_the_loss_of_pictures_is_that_of_their_codes_and_the_dvae_stays_as_it_is():
    model, text, image = build(dropout=0.0), text_of(2), torch.rand(2, 3, 32, 32)
    found = model(text=text, image=image)
    codes = model.dvae.encode(image)
    torch.testing.assert_close(found["loss"], model(text=text, codes=codes)["loss"])
    torch.testing.assert_close(found["loss"], model.transformer(text, codes.flatten(1))["loss"])
    found["loss"].backward()
    assert not any(p.requires_grad for p in model.dvae.parameters())  # no engine keeps optimizer states for them
    assert not model.train().dvae.training


def test_captions_are_left_out_as_often_as_asked_and_only_in_training():
    model, seen = build(dropout=0.3), []
    model.transformer.forward = lambda text, codes, read=None: seen.append(text)
    text, codes = torch.ones(2000, 6, dtype=torch.int64), torch.zeros(2000, 4, 4, dtype=torch.int64)
    model.eval()(text=text, codes=codes)
    model.train()(text=text, codes=codes)
    assert torch.equal(seen[0], text)
    whole, none = (seen[1] == 1).all(1), (seen[1] == 0).all(1)
    assert (whole | none).all() and 0.26 < none.float().mean() < 0.34


def test_codes_are_read_as_others_evenly_up_to_the_part_asked_for_and_only_in_training(monkeypatch):
    model, text = build(dropout=0.0, code_dropout=0.8), text_of(4).repeat(100, 1)
    codes, read = torch.zeros(400, 4, 4, dtype=torch.int64), []
    monkeypatch.setattr(model.transformer, "forward", lambda text, codes, seen=None: read.append((codes, seen)) or {})
    torch.manual_seed(0)
    model.train()(text=text, codes=codes)
    model.eval()(text=text, codes=codes)
    (predicted, seen), (_, unchanged) = read
    assert unchanged is None and torch.equal(predicted, codes.flatten(1))
    parts = (seen != 0).float().mean(1)  # one code in 16 becomes itself
    assert parts.mean() == pytest.approx(0.4 * 15 / 16, abs=0.03)
    assert parts.min() == 0 and parts.max() > 0.6  # a sample's part is its own


def test_what_is_read_and_what_is_predicted_may_differ():
    model, text, codes = build().transformer, text_of(2), torch.randint(16, (2, 16))
    logits = model.logits(text, torch.zeros_like(codes))[1]
    found = model(text, codes, torch.zeros_like(codes))["image"]
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten()))


# --- at the door -----------------------------------------------------------------------------------------------------
def test_an_image_tokenizer_of_another_code_book_or_grid_is_refused():
    for other in (replace(IMAGE, vocab=32), replace(IMAGE, size=64)):
        with pytest.raises(SettingsError, match="trained with another"):
            Dalle(DalleConfig(transformer=SIZES), Dvae(other))


@pytest.mark.parametrize(
    "words,message",
    [
        ({"n": 0}, "n=0"),
        ({"candidates": 1, "n": 2}, "candidates=1"),
        ({"candidates": 4}, "rerank"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"first_rows": (torch.zeros(3, 16, 16), 1)}, "32"),
        ({"first_rows": (torch.zeros(3, 32, 32), 4)}, "of 4 rows"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_what_cannot_be_drawn_is_said(words, message):
    with pytest.raises(SettingsError, match=message):
        build().generate("cat", progress=False, **words)


def test_no_prompt_at_all_and_a_prompt_too_long_are_refused_and_an_empty_one_is_a_picture_of_anything():
    model = build()
    with pytest.raises(SettingsError, match="no prompt"):
        model.generate([])
    with pytest.raises(CaptionTooLong):
        model.generate("elephants")
    assert isinstance(model.generate("", progress=False)[0][0], Image.Image)
    model.tokenizer = None
    with pytest.raises(SettingsError, match="tokenizer"):
        model.generate("cat")


def test_guidance_without_caption_dropout_warns(caplog):
    with caplog.at_level(logging.WARNING, logger="zoo.models"):
        build(dropout=0.1).generate("cat", guidance=2.0, progress=False)
        assert not caplog.records
        build(dropout=0.0).generate("cat", guidance=2.0, progress=False)
    assert "caption dropout" in caplog.text
