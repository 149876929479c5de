"""Drawing with DALL-E mini: the fast way draws, token for token, what the plain one draws.

That its logits are the published network's is shown in tests/converters/test_dalle_mini.py, over published names.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

import pytest
import torch

from zoo.errors import CaptionTooLong, SettingsError
from zoo.generation.tokens import Sampling, choose, uniforms
from zoo.models.dalle import Dalle
from zoo.models.dalle_mini import DalleMiniConfig, DalleMiniDecoding, dalle_mini
from zoo.models.dalle_mini_bart import BartConfig
from zoo.models.vqgan import VqganConfig

PAD, START, CODES, ROWS, LENGTH = 1, 18, 16, 20, 9  # rows 16, 17 and 19 were never used
CONFIG = DalleMiniConfig(
    image=VqganConfig(size=6, widths=(32, 32), blocks=1, attention=(), latent=8, vocab=CODES, code_width=8, black=0.0),
    transformer=BartConfig(
        text_vocab=30, text_length=6, vocab=CODES, rows=ROWS, start=START, grid=3, width=16, depth=3, heads=2, hidden=12
    ),
    empty=(0, 2),
    guidance=3.0,
)
SAMPLINGS = [
    Sampling(),
    Sampling(guidance=3.0),
    Sampling(temperature=0, guidance=10.0),
    Sampling(temperature=0.7, top_k=5, guidance=0.0),
]


class Letters:
    """A tokenizer of letters, between a start and an end token."""

    def tokenize_as_tensor(self, texts, context_length=6, truncate="end"):
        rows = [[0, *(ord(letter) - 94 for letter in text), 2] for text in texts]
        if max(map(len, rows)) > context_length:
            raise CaptionTooLong(f"more than {context_length} tokens")
        return torch.tensor([row + [PAD] * (context_length - len(row)) for row in rows])


def build(config: DalleMiniConfig = CONFIG) -> Dalle:
    torch.manual_seed(0)
    model = dalle_mini(config, tokenizer=Letters())
    for parameter in model.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def captions(*texts: str) -> torch.Tensor:
    return Letters().tokenize_as_tensor(texts)


@torch.no_grad()
def plain(model: Dalle, text: torch.Tensor, seeds: list[int], sampling: Sampling) -> torch.Tensor:
    """Without any cache: for each code the whole sequence again, for each row alone, guided by a second pass."""
    found, empty = [], torch.tensor([[0, 2, 1, 1, 1, 1]])
    for row, seed in zip(text, seeds, strict=True):
        numbers, codes = uniforms([seed], LENGTH)[0], torch.zeros(1, LENGTH, dtype=torch.int64)
        for place in range(LENGTH):
            logits, without = (model.transformer.logits(t, codes)[:, place, :CODES] for t in (row[None], empty))
            logits = without + sampling.guidance * (logits - without)
            codes[:, place] = choose(logits, numbers[place : place + 1], sampling)
        found.append(codes[0])
    return torch.stack(found).unflatten(1, (3, 3))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("texts", ["ab ab cd cd", "ab", "ab cd ef", "ab ab cd"])
def test_cached_guided_and_batched_drawing_equals_the_plain_one(texts, sampling):
    model, text = build(), captions(*texts.split())
    seeds = list(range(5, 5 + len(text)))
    with torch.no_grad():
        found = model.draw(text, seeds, sampling)
    assert torch.equal(found, plain(model, text, seeds, sampling))
    assert found.unique().numel() > 1


def test_cached_logits_equal_those_of_the_whole_sequence_of_each_row():
    model, text = build().transformer, captions("abc", "d")
    codes, empty = torch.randint(CODES, (6, LENGTH)), torch.tensor([[0, 2, 1, 1, 1, 1]])
    with torch.no_grad():
        whole = model.logits(text.repeat_interleave(3, 0), codes)
        without = model.logits(empty.expand(6, -1), codes)
        for expected, decoding in (
            (whole, DalleMiniDecoding(model, text, 3)),
            (without + 2.5 * (whole - without), DalleMiniDecoding(model, text, 3, empty, 2.5)),
        ):
            for place in range(LENGTH):
                found = decoding(codes[:, place - 1] if place else None, place)
                torch.testing.assert_close(found, expected[:, place, :CODES], atol=1e-5, rtol=1e-5)


def test_each_prompt_and_the_empty_one_are_read_once_whatever_is_drawn_of_them():
    model, seen = build(), []
    model.transformer.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].tolist()))
    pictures = model.generate(["ab", "c"], n=5, guidance=1.0, progress=False)
    model.generate(["ab", "c"], n=5, guidance=4.0, progress=False)
    prompts = captions("ab", "c").tolist()
    assert [len(of_prompt) for of_prompt in pictures] == [5, 5]
    assert seen == [prompts, [*prompts, [0, 2, 1, 1, 1, 1]]]


def test_a_caption_is_read_without_its_padding():
    model = build().transformer
    short, text = captions("ab")[:, :4], captions("ab")
    codes = torch.randint(CODES, (1, LENGTH))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(short, codes), model.logits(text, codes))


def test_a_picture_depends_on_its_prompt_and_seed_and_on_nothing_that_is_drawn_with_it():
    model = build()
    many = model.generate(["cat", "dog", "fox"], n=3, seed=7, progress=False)
    assert many == model.generate(["cat", "dog", "fox"], n=3, seed=7, batch_size=4, progress=False)
    assert many[1][2] == model.generate("dog", seed=9, progress=False)[0][0]
    assert many[1][2] != many[1][1] and many[0] != many[1]


def test_where_no_guidance_is_asked_for_it_is_the_configs():
    model, other = build(), build(replace(CONFIG, guidance=1.0))
    drawn = model.generate("cat", n=4, progress=False)
    assert drawn == other.generate("cat", n=4, guidance=3.0, progress=False)
    assert drawn != other.generate("cat", n=4, progress=False)


def test_first_rows_previews_and_reranking_are_those_of_dalle():
    model, picture, shown = build(), torch.rand(3, 6, 6), []
    codes = model.dvae.encode(picture[None])[0]
    words = {"first_rows": (picture, 2), "preview": lambda row, so_far: shown.append(so_far), "progress": False}
    brightness = lambda prompt, pictures: [sum(p.convert("L").tobytes()) for p in pictures]  # noqa: E731
    best = model.generate("cat", n=1, candidates=4, rerank=brightness, **words)[0]
    with torch.no_grad():
        drawn = model.draw(captions(*["cat"] * 4), [0, 1, 2, 3], Sampling(guidance=3.0), given=codes[:2].flatten())
    assert torch.equal(drawn[:, :2], codes[:2].expand(4, -1, -1)) and len(shown) == 3 and len(best) == 1
    torch.testing.assert_close(shown[-1], model.dvae.decode(drawn))


# --- training --------------------------------------------------------------------------------------------------------
def test_the_loss_is_the_mean_surprise_at_each_code_and_pictures_are_encoded_for_it():
    model, text, image = build(replace(CONFIG, caption_dropout=0.0)), captions("ab", "c"), torch.rand(2, 3, 6, 6)
    codes = model.dvae.encode(image)
    with torch.no_grad():
        chances = model.transformer.logits(text, codes.flatten(1)).softmax(-1)
    expected = -chances.gather(-1, codes.flatten(1)[..., None]).log().mean()
    loss = model.train()(text=text, image=image)["loss"]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.transformer.parameters())
    assert not any(parameter.requires_grad for parameter in model.dvae.parameters())


def test_recomputed_activations_give_the_same_gradients():
    text, codes, found = captions("ab", "c"), torch.randint(CODES, (2, LENGTH)), []
    for enable in (False, True):
        model = build(replace(CONFIG, caption_dropout=0.0)).train()
        calls = []
        model.transformer.decoder.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.set_grad_checkpointing(enable)
        model(text=text, codes=codes)["loss"].backward()
        found.append([parameter.grad for parameter in model.transformer.parameters()])
        assert len(calls) == 1 + enable
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_captions_are_emptied_as_often_as_asked_and_only_in_training():
    model, seen = build(replace(CONFIG, caption_dropout=0.3)), []
    model.transformer.forward = lambda text, codes, read=None: seen.append(text)
    text, codes = captions("abcd").expand(2000, -1), torch.zeros(2000, 3, 3, dtype=torch.int64)
    model.eval()(text=text, codes=codes)
    model.train()(text=text, codes=codes)
    assert torch.equal(seen[0], text)
    emptied = (seen[1] == torch.tensor([0, 2, 1, 1, 1, 1])).all(1)
    assert ((seen[1] == text).all(1) | emptied).all() and 0.26 < emptied.float().mean() < 0.34


# --- at the door -----------------------------------------------------------------------------------------------------
def test_a_config_survives_json():
    assert DalleMiniConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(CONFIG)))) == CONFIG
    with pytest.raises(TypeError):
        DalleMiniConfig.from_dict({"layers": 3})


def test_a_vqgan_of_another_code_book_or_grid_is_refused():
    for other in (replace(CONFIG.image, vocab=15), replace(CONFIG.image, size=12)):
        with pytest.raises(SettingsError, match="trained with another"):
            build(replace(CONFIG, image=other))


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(SettingsError, match="3 heads"):
        replace(CONFIG.transformer, heads=3)


def test_a_prompt_of_more_tokens_than_the_encoder_reads_is_refused():
    with pytest.raises(CaptionTooLong):
        build().generate("abcde", progress=False)
