"""CLIP-GEN: what it learns from pictures, and that it draws from text, token for token, what the plain way draws."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from zoo.data.transforms import clip_transform
from zoo.errors import CaptionTooLong, SettingsError
from zoo.generation.tokens import Sampling, choose, uniforms
from zoo.models.clip import Clip, ClipConfig, TextConfig, VitConfig
from zoo.models.clip_gen import ClipGen, ClipGenConfig, as_clip_sees
from zoo.models.clip_gen_transformer import ClipGenTransformer, ClipGenTransformerConfig
from zoo.models.vqgan import Vqgan, VqganConfig

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
SIZES = ClipGenTransformerConfig(embed=8, vocab=14, grid=4, width=16, depth=3, heads=2)
CONFIG = ClipGenConfig(
    clip=ClipConfig(
        embed=8,
        image=VitConfig(size=12, patch=4, width=16, depth=1, heads=2),
        text=TextConfig(context=7, vocab=30, width=16, depth=1, heads=2),
        mean=MEAN,
        std=STD,
    ),
    image=VqganConfig(size=16, widths=(32, 32, 32), blocks=1, attention=(), latent=6, vocab=14, code_width=6),
    transformer=SIZES,
)
TOP = Sampling(top_k=6, top_p=0.8)


class Letters:
    """A tokenizer of letters, whose end is the largest id."""

    def tokenize_as_tensor(self, texts, context_length=7, truncate="end"):
        rows = [[*(ord(letter) - 96 for letter in text.strip()), 29] for text in texts]
        for row in rows:
            if len(row) > context_length:
                assert truncate == "error"
                raise CaptionTooLong(f"{len(row)} tokens")
        return torch.tensor([row + [0] * (context_length - len(row)) for row in rows])


def build(config: ClipGenConfig = CONFIG, **words: float) -> ClipGen:
    torch.manual_seed(0)
    model = ClipGen(replace(config, **words), tokenizer=Letters())
    for part, spread in ((model.transformer, 0.3), (model.vqgan, 0.2), (model.clip, 0.8)):
        for parameter in part.parameters():  # also gains and biases, so that none can be left out unseen
            nn.init.normal_(parameter, std=spread)
    nn.init.normal_(model.transformer.context.weight, std=2.0)  # so that an embedding counts for as much as codes
    return model.eval()


def batch(n: int = 3) -> tuple[Tensor, Tensor]:
    """Embeddings of length 1, and codes."""
    torch.manual_seed(1)
    return F.normalize(torch.randn(n, 8), dim=-1), torch.randint(14, (n, 4, 4))


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


# --- the transformer -------------------------------------------------------------------------------------------------
def torchs(model: ClipGenTransformer) -> Callable[[Tensor, Tensor], Tensor]:
    """Embeddings and codes -> logits (B, N, V) by torch's layers, as the release stacks them, in the model's mode."""
    w, sizes, layers = model.state_dict(), model.config, []
    names = {"self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "out.", "linear1.": "mlp.up."}
    names |= {"linear2.": "mlp.down.", "norm1.": "norm1.", "norm2.": "norm2."}
    for number in range(sizes.depth):
        layer = nn.TransformerEncoderLayer(
            *(sizes.width, sizes.heads, 4 * sizes.width, sizes.dropout, F.gelu), norm_first=True, batch_first=True
        ).train(model.training)
        kinds = ("weight", "bias")
        layer.load_state_dict({t + k: w[f"blocks.{number}.{our}{k}"] for t, our in names.items() for k in kinds})
        layers.append(layer)

    def logits(embedding: Tensor, codes: Tensor) -> Tensor:
        first = embedding @ w["context.weight"].T + w["context.bias"]
        length = sizes.grid**2
        x = torch.cat([first[:, None], w["image.weight"][codes]], 1)[:, :length] + w["positions.weight"]
        for layer in layers:
            x = layer(x, src_mask=torch.ones(length, length).triu(1).bool())
        x = F.layer_norm(x, x.shape[-1:], w["norm.weight"], w["norm.bias"])
        return x @ w["image_head.weight"].T + w["image_head.bias"]

    return logits


@pytest.mark.parametrize("training", [False, True])
def test_logits_equal_those_of_torchs_layers_and_dropout_is_where_theirs_is(training):
    model = build(transformer=replace(SIZES, dropout=0.3)).transformer.train(training)
    embedding, codes = batch(1 if training else 3)  # of several, torch draws in another order
    found = []
    for logits in (model.logits, torchs(model)):
        torch.manual_seed(5)
        found.append(logits(embedding, codes.flatten(1)))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert training != found[0].allclose(model.logits(embedding, codes.flatten(1)))


def test_the_loss_is_the_mean_nats_per_code_and_what_is_read_may_be_other_codes():
    model = build().transformer
    embedding, codes = batch()
    codes, seen = codes.flatten(1), codes.flatten(1).flip(1)
    for read in (None, seen):
        with torch.no_grad():
            logits = torchs(model)(embedding, codes if read is None else read)
        expected = (logits.exp().sum(-1).log() - logits.gather(2, codes[..., None])[..., 0]).mean()
        torch.testing.assert_close(model(embedding, codes, read)["loss"], expected)


def test_a_code_is_predicted_from_the_embedding_and_those_before_it_and_the_last_is_never_read():
    model = build().transformer
    embedding, codes = batch(1)
    codes = codes.flatten(1)
    with torch.no_grad():
        logits = model.logits(embedding, codes)
        for place in range(16):
            other = codes.clone()
            other[0, place] = (other[0, place] + 1) % 14
            changed = (model.logits(embedding, other) - logits).abs().amax(2)[0] > 1e-6
            assert changed.nonzero()[:, 0].tolist() == list(range(place + 1, 16))
        assert ((model.logits(-embedding, codes) - logits).abs().amax(2) > 1e-6).all()


def test_recomputed_activations_give_the_same_gradients_with_dropout():
    embedding, codes = batch()
    found = []
    for recompute in (False, True):
        model = build(transformer=replace(SIZES, dropout=0.2)).train()
        model.set_grad_checkpointing(recompute)
        torch.manual_seed(3)
        model(codes=codes, embedding=embedding)["loss"].backward()
        found.append([p.grad for p in model.transformer.parameters()])
    for kept, again in zip(*found, strict=True):
        torch.testing.assert_close(again, kept)


# --- drawing ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def plain(model: ClipGen, texts: list[str], seeds: list[int], sampling: Sampling) -> Tensor:
    """Without any cache: for each code the whole sequence again, for each row alone, guided by a second pass."""
    found, of = [], torchs(model.transformer)
    for text, seed in zip(texts, seeds, strict=True):
        embedding = unit(model.clip.encode_text(Letters().tokenize_as_tensor([text])))
        numbers, codes = uniforms([seed], 16)[0], torch.zeros(1, 16, dtype=torch.int64)
        for place in range(16):
            logits = of(embedding, codes)[:, place]
            if sampling.guidance != 1:
                nothing = of(torch.zeros(1, 8), codes)[:, place]
                logits = nothing + sampling.guidance * (logits - nothing)
            codes[:, place] = choose(logits, numbers[place : place + 1], sampling)
        found.append(codes[0])
    return torch.stack(found).unflatten(1, (4, 4))


@pytest.mark.parametrize(
    "sampling", [Sampling(), TOP, replace(TOP, guidance=3.0), Sampling(temperature=0, guidance=8.0)], ids=str
)
def test_cached_guided_and_batched_drawing_equals_the_plain_one(sampling):
    model = build()
    texts, seeds = ["cat", "cat", "dog", "dog", "ox", "ox"], [5, 6, 7, 8, 9, 10]
    with torch.no_grad():
        found = model.draw(model.contexts(texts), seeds, sampling)
    assert torch.equal(found, plain(model, texts, seeds, sampling))
    assert len(found.flatten(1).unique(dim=0)) > 1


def test_the_pictures_are_those_of_the_codes_and_each_depends_on_its_prompt_and_seed_alone():
    model = build(guidance=1.5)
    words = {"top_k": 6, "top_p": 0.8, "progress": False}
    many = model.generate(["cat", "dog"], n=3, seed=7, **words)
    codes = plain(model, ["cat"] * 3 + ["dog"] * 3, [7, 8, 9] * 2, replace(TOP, guidance=1.5))
    pixels = np.stack([np.array(picture) for row in many for picture in row])
    expected = model.vqgan.decode(codes).permute(0, 2, 3, 1) * 255
    assert abs(pixels - expected.numpy()).max() <= 0.51
    assert many == model.generate(["cat", "dog"], n=3, seed=7, batch_size=2, **words)
    assert many[1][2] == model.generate("dog", seed=9, **words)[0][0] != many[0][2]


def test_sixty_four_candidates_read_their_prompt_once():
    model, seen = build(), []
    model.transformer.blocks[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[0] * x[0].shape[1]))
    read = []
    model.clip.text.register_forward_pre_hook(lambda _, x: read.append(len(x[0])))
    model.generate(["cat", "dog"], n=64, progress=False)
    assert seen == [2] + [128] * 15 and read == [2]


def test_the_models_own_clip_chooses_the_best_first():
    model = build()
    drawn = model.generate("cat", n=6, progress=False)[0]
    transform = clip_transform(12, MEAN, STD)  # of pictures of 16 pixels; Pillow rounds where torch does not
    with torch.no_grad():
        pictures = model.clip.encode_image(torch.stack([transform(picture) for picture in drawn]))
        text = model.clip.encode_text(Letters().tokenize_as_tensor(["cat"]))
    scores = (unit(pictures) @ unit(text)[0]).tolist()
    assert model.score("cat", drawn) == pytest.approx(scores, abs=0.02)
    found = model.generate("cat", n=2, candidates=6, rerank=model.score, progress=False)[0]
    order = sorted(range(6), key=lambda i: -model.score("cat", drawn)[i])
    assert found == [drawn[i] for i in order[:2]]


def test_a_context_is_the_texts_embedding_of_length_1():
    model = build()
    with torch.no_grad():
        found = model.contexts(["dog", "cat", "dog"])
        for row, text in zip(found, ["dog", "cat", "dog"], strict=True):
            alone = model.clip.encode_text(Letters().tokenize_as_tensor([text]))[0]
            torch.testing.assert_close(row, unit(alone))
    assert torch.equal(found[0], found[2]) and not torch.allclose(found[0], found[1])


def test_no_text_is_nothing_where_training_told_what_that_is():
    with torch.no_grad():
        for dropout, length in ((0.1, 0), (0.0, 1)):
            found = build(condition_dropout=dropout).contexts(["cat", "", " "]).square().sum(1)
            assert found.tolist() == pytest.approx([1, length, length])
    model = build(condition_dropout=0.1)
    with torch.no_grad():
        codes = model.draw(model.contexts([""]), [3])
        assert torch.equal(codes, model.draw(model.contexts([""]), [3], Sampling(guidance=4.0)))  # nowhere to go


def test_half_precision_draws_too():
    model = build(condition_dropout=0.1).to(torch.bfloat16)
    assert model.generate("cat", guidance=2.0, progress=False)[0][0].size == (16, 16)


def test_guidance_without_condition_dropout_warns(caplog):
    with caplog.at_level(logging.WARNING, logger="zoo.models"):
        build(condition_dropout=0.1).generate("cat", guidance=2.0, progress=False)
        assert not caplog.records
        build().generate("cat", guidance=2.0, progress=False)
    assert "condition dropout" in caplog.text


# --- training --------------------------------------------------------------------------------------------------------
def normalised(image: Tensor) -> Tensor:
    """Of CLIP's size already."""
    return torch.stack([(image[:, i] - MEAN[i]) / STD[i] for i in range(3)], 1)


def test_pictures_are_learnt_by_their_codes_and_clip_embeddings_which_may_be_given():
    model, image = build(), torch.rand(3, 3, 16, 16)
    codes = model.vqgan.encode(image)
    embedding = model.clip.encode_image(as_clip_sees(model.clip, image))
    expected = model.transformer(unit(embedding), codes.flatten(1))["loss"]
    for words in (
        {"image": image},
        {"codes": codes, "embedding": embedding},
        {"codes": codes, "embedding": 7 * embedding},
        {"image": image, "codes": codes},
        {"image": torch.zeros_like(image), "codes": codes, "embedding": embedding},
    ):
        found = model(**words)
        assert found.keys() == {"loss"}
        torch.testing.assert_close(found["loss"], expected)


def test_clip_sees_pictures_as_its_own_transform_shows_them():
    model = build()
    smooth = F.interpolate(torch.rand(1, 3, 5, 5), (16, 16), mode="bilinear")
    picture = Image.fromarray((smooth[0] * 255).round().byte().permute(1, 2, 0).numpy())
    image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    level = 1.01 / 255 / min(STD)  # Pillow rounds to levels
    torch.testing.assert_close(
        as_clip_sees(model.clip, image)[0], clip_transform(12, MEAN, STD)(picture), atol=level, rtol=0
    )
    equal = torch.rand(2, 3, 12, 12)
    torch.testing.assert_close(as_clip_sees(model.clip, equal), normalised(equal))
    assert as_clip_sees(model.clip, (torch.rand(1, 3, 16, 16) > 0.5).float()).amax((0, 2, 3)).tolist() <= [
        (1 - mean) / std + 1e-6 for mean, std in zip(MEAN, STD, strict=True)
    ]


def test_clip_and_vqgan_stay_as_they_are():
    model = build(embedding_weight=1.0).train()
    assert model.transformer.training and not model.clip.training and not model.vqgan.training
    model(image=torch.rand(2, 3, 16, 16))["loss"].backward()
    trained = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"transformer"}
    assert all(p.grad is None for part in (model.clip, model.vqgan) for p in part.parameters())
    assert all(p.grad is not None for p in model.transformer.parameters())


def shown(model: ClipGen, embedding: Tensor, monkeypatch) -> list[Tensor]:
    """What the transformer is told in evaluation and in training."""
    told: list[Tensor] = []
    monkeypatch.setattr(model.transformer, "forward", lambda e, codes, seen: told.append(e) or {"loss": 0})
    codes = torch.zeros(len(embedding), 4, 4, dtype=torch.int64)
    for mode in (False, True):
        model.train(mode)(codes=codes, embedding=embedding)
    return told


def test_conditions_are_left_out_as_often_as_asked_and_only_in_training(monkeypatch):
    embedding = F.normalize(torch.randn(2000, 8), dim=-1)
    plainly, told = shown(build(condition_dropout=0.3), embedding, monkeypatch)
    torch.testing.assert_close(plainly, embedding)
    nothing = (told == 0).all(1)
    assert 0.26 < nothing.float().mean() < 0.34
    torch.testing.assert_close(told[~nothing], embedding[~nothing])


@pytest.mark.parametrize("noise", [0.25, 0.75])
def test_noise_moves_embeddings_so_far_in_a_random_direction_and_only_in_training(noise, monkeypatch):
    """A step of length s from a unit vector, square to it in so many dimensions, makes an angle of tangent s."""
    torch.manual_seed(0)
    embedding = F.normalize(torch.randn(500, 4096), dim=-1)
    plainly, told = shown(build(noise=noise), embedding, monkeypatch)
    torch.testing.assert_close(plainly, embedding)
    torch.testing.assert_close(told.square().sum(1), torch.ones(500))
    cosines = (told * embedding).sum(1)
    assert cosines.tolist() == pytest.approx([1 / math.sqrt(1 + noise**2)] * 500, abs=0.05)
    away = F.normalize(told - cosines[:, None] * embedding, dim=-1)
    assert (away @ away.T).fill_diagonal_(0).abs().max() < 0.1  # each its own direction


def test_codes_are_read_as_others_evenly_up_to_the_part_asked_for_and_only_in_training(monkeypatch):
    model, read = build(code_dropout=0.8), []
    monkeypatch.setattr(model.transformer, "forward", lambda e, codes, seen: read.append((codes, seen)) or {"loss": 0})
    codes, embedding = torch.zeros(400, 4, 4, dtype=torch.int64), torch.ones(400, 8)
    torch.manual_seed(0)
    for mode in (True, False):
        model.train(mode)(codes=codes, embedding=embedding)
    (predicted, seen), (_, unchanged) = read
    assert unchanged is None and not predicted.any()
    parts = (seen != 0).float().mean(1)  # one code in 14 becomes itself
    assert parts.mean() == pytest.approx(0.4 * 13 / 14, abs=0.03)
    assert parts.min() == 0 and parts.max() > 0.6


# --- the embedding's reconstruction ----------------------------------------------------------------------------------
@pytest.mark.parametrize("change", [{}, {"quantizer": "cosine"}, {"quantizer": "gumbel", "black": 0.0}], ids=str)
def test_the_embedding_loss_is_how_far_the_likeliest_picture_is_from_the_condition(change):
    config = replace(CONFIG, clip=replace(CONFIG.clip, image=replace(CONFIG.clip.image, size=16)))
    model = build(config, image=replace(CONFIG.image, **change), embedding_weight=0.25)
    embedding, codes = batch()
    found = model(codes=codes, embedding=embedding)
    with torch.no_grad():
        logits = model.transformer.logits(embedding, codes.flatten(1))
        picture = model.vqgan.decode(logits.argmax(-1).unflatten(1, (4, 4)))
        cosines = (unit(model.clip.encode_image(normalised(picture))) * embedding).sum(1)
    assert picture.std() > 0.05
    torch.testing.assert_close(found["embedding"], (1 - cosines).mean(), atol=1e-5, rtol=1e-5)
    nats = F.cross_entropy(logits.flatten(0, 1), codes.flatten())
    torch.testing.assert_close(found["codes"], nats)
    torch.testing.assert_close(found["loss"], nats + 0.25 * (1 - cosines).mean(), atol=1e-5, rtol=1e-5)


def test_the_embedding_losses_gradient_is_that_of_the_mixture_of_codes_at_the_likeliest_ones():
    """With a the gradient at a place's row times each code's row, and p its probabilities: p (a - p a)."""
    config = replace(CONFIG, clip=replace(CONFIG.clip, image=replace(CONFIG.clip.image, size=16)))
    model = build(config)
    embedding = batch()[0]
    logits = torch.randn(3, 16, 14, requires_grad=True)
    model.embedding_loss(logits, embedding).backward()
    book = model.vqgan.quantize.embedding.weight.detach()
    rows = book[logits.argmax(-1)].requires_grad_()  # (B, N, C)
    latents = model.vqgan.post_quant_conv(rows.mT.unflatten(2, (4, 4)))
    picture = (model.vqgan.decoder(latents).clamp(-1, 1) + 1) / 2
    (1 - (unit(model.clip.encode_image(normalised(picture))) * embedding).sum(1)).mean().backward()
    p, a = logits.detach().softmax(-1), rows.grad @ book.T
    expected = p * (a - (p * a).sum(-1, keepdim=True))
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(logits.grad, expected, atol=1e-8, rtol=1e-3)


def test_descending_the_embedding_loss_alone_brings_pictures_to_their_embedding():
    torch.manual_seed(0)
    model = build()
    embedding = F.normalize(model.embed(model.vqgan.decode(torch.randint(14, (1, 4, 4)))).detach(), dim=-1)
    logits = torch.randn(1, 16, 14, requires_grad=True)
    optimizer, found = torch.optim.Adam([logits], 0.1), []
    for _ in range(60):
        found.append(model.embedding_loss(logits, embedding))
        optimizer.zero_grad()
        found[-1].backward()
        optimizer.step()
    assert min(found[40:]) < 0.5 * found[0]


def test_of_what_was_left_out_no_embedding_is_asked(monkeypatch):
    embedding, codes = batch(2)
    model = build(embedding_weight=1.0)
    logits = model.transformer.logits(embedding, codes.flatten(1))
    monkeypatch.setattr(model, "blurred", lambda e: e * torch.tensor([[1.0], [0.0]]))
    monkeypatch.setattr(model.transformer, "forward", lambda *_: {"loss": torch.zeros(()), "logits": logits})
    found = model.train()(codes=codes, embedding=embedding)["embedding"]
    torch.testing.assert_close(found, model.embedding_loss(logits[:1], embedding[:1]) / 2)


# --- at the door -----------------------------------------------------------------------------------------------------
def test_the_config_is_what_its_json_says():
    config = replace(CONFIG, condition_dropout=0.1, noise=0.2, code_dropout=0.3, embedding_weight=0.4, guidance=2.0)
    assert ClipGenConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    with pytest.raises(TypeError):
        ClipGenConfig.from_dict({"layers": 3})


@pytest.mark.parametrize("change", [{"vocab": 15}, {"size": 32}], ids=str)
def test_a_vqgan_of_another_code_book_or_grid_is_refused(change):
    with pytest.raises(SettingsError, match="trained with another"):
        ClipGen(CONFIG, vqgan=Vqgan(replace(CONFIG.image, **change)))


def test_a_clip_of_another_width_is_refused():
    with pytest.raises(SettingsError, match=r"embeddings are 16 wide and the transformer reads 8.*give that CLIP"):
        ClipGen(CONFIG, clip=Clip(replace(CONFIG.clip, embed=16)))


def test_an_embedding_loss_over_a_wavelet_is_refused():
    with pytest.raises(SettingsError, match="wavelet"):
        ClipGen(replace(CONFIG, image=replace(CONFIG.image, haar=True), embedding_weight=1.0))


@pytest.mark.parametrize(
    "words,message", [({"width": 15}, "width of 15"), ({"dropout": 1.0}, r"dropout=1\.0"), ({"dropout": -0.1}, "-0.1")]
)
def test_sizes_that_cannot_be_are_refused(words, message):
    with pytest.raises(SettingsError, match=message):
        replace(SIZES, **words)


def test_what_cannot_be_learnt_from_is_said():
    model, codes = build(), torch.zeros(1, 4, 4, dtype=torch.int64)
    for words in ({}, {"codes": codes}, {"embedding": torch.ones(1, 8)}):
        with pytest.raises(SettingsError, match="codes and their CLIP embeddings"):
            model(**words)
    with pytest.raises(SettingsError, match=r"4 x 4 codes, and these are \(2, 2\): give pictures \(B, 3, 16, 16\)"):
        model(image=torch.zeros(1, 3, 8, 8))


def test_a_prompt_too_long_and_a_missing_tokenizer_are_refused():
    model = build()
    with pytest.raises(CaptionTooLong):
        model.generate("elephant")
    model.tokenizer = None
    with pytest.raises(SettingsError, match=r"ClipGen\(..., tokenizer=\)"):
        model.generate("cat")
