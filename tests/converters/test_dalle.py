"""The two published layouts of one stream of text and codes: minDALL-E's and ruDALL-E's.

The transformers here are written from the published code's formulas, over the published names and with every mask drawn
by a loop, so that what is made of the weights is compared with a second computation, not with itself.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from zoo import weights
from zoo.converters.dalle import to_ours
from zoo.errors import WeightsMismatch
from zoo.models.dalle import Dalle, DalleConfig
from zoo.models.vqgan import Vqgan, VqganConfig

WIDTH, HEADS, DEPTH, TEXT, WORDS, CODES = 32, 4, 5, 5, 30, 20
SIDE = {"min": 3, "ru": 8}  # ruDALL-E's window of 11 must be cut off by the sides
VQGAN = VqganConfig(
    size=0,
    widths=(32, 32),
    blocks=1,
    attention=(1,),
    latent=8,
    vocab=CODES,
    code_width=8,
    codebook=0.25,
    commitment=1.0,
)
VQGANS = {
    "min": dataclasses.replace(VQGAN, size=2 * SIDE["min"]),
    "ru": dataclasses.replace(VQGAN, size=2 * SIDE["ru"], quantizer="gumbel"),
}
every_source = pytest.mark.parametrize("source", ["min", "ru"])


# --- the weights -----------------------------------------------------------------------------------------------------
def layer(name: str, out: int, into: int) -> dict:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str) -> dict:
    return {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}


def shapes_of_min() -> dict[str, tuple[int, ...]]:
    """dalle/models/stage2/transformer.py, Transformer1d; its mask is not saved."""
    found = {"tok_emb_img.weight": (CODES, WIDTH), "tok_emb_txt.weight": (WORDS, WIDTH)}
    found |= {"pos_emb_img.weight": (SIDE["min"] ** 2, WIDTH), "pos_emb_txt.weight": (TEXT, WIDTH)}
    for i in range(DEPTH):
        found |= norm(f"blocks.{i}.ln1") | norm(f"blocks.{i}.ln2")
        for part in ("key", "query", "value", "proj"):
            found |= layer(f"blocks.{i}.attn.{part}", WIDTH, WIDTH)
        found |= layer(f"blocks.{i}.mlp.0", 4 * WIDTH, WIDTH) | layer(f"blocks.{i}.mlp.2", WIDTH, 4 * WIDTH)
    return found | norm("ln_f") | {"head_img.weight": (CODES, WIDTH), "head_txt.weight": (WORDS, WIDTH)}


def shapes_of_ru() -> dict[str, tuple[int, ...]]:
    """rudalle/dalle/model.py and transformer.py; the masks come from `masks_of_ru`."""
    found = {"text_embeddings.weight": (WORDS + TEXT, WIDTH), "image_embeddings.weight": (CODES, WIDTH)}
    found |= {"text_pos_embeddings.weight": (TEXT + 1, WIDTH)}
    found |= {f"image_{axis}_embeddings.weight": (SIDE["ru"], WIDTH) for axis in ("row", "col")}
    found |= norm("to_logits.0") | layer("to_logits.1", WORDS + TEXT + CODES, WIDTH)
    for i in range(DEPTH):
        at = f"transformer.layers.{i}"
        for part in ("input", "before_first_addition_", "before_second_addition_", "post_attention_"):
            found |= norm(f"{at}.{part.rstrip('_')}_layernorm")
        found |= layer(f"{at}.attention.query_key_value", 3 * WIDTH, WIDTH)
        found |= layer(f"{at}.attention.dense", WIDTH, WIDTH)
        found |= layer(f"{at}.mlp.dense_h_to_4h", 4 * WIDTH, WIDTH)
        found |= layer(f"{at}.mlp.dense_4h_to_h", WIDTH, 4 * WIDTH)
    return found | norm("transformer.final_layernorm")


def masks_of_ru(version: int = 3) -> dict[str, Tensor]:
    """rudalle/dalle/image_attention.py in words: a code sees all text, and of the codes up to itself, "row": those at
    most one row's length back; "col": those of its column; "conv": those at most 5 rows and columns away, where before
    v3 rows and columns are rings."""
    side = SIDE["ru"]
    length = TEXT + side**2
    masks = {name: torch.zeros(length, length, dtype=torch.bool) for name in ("row", "col", "conv")}

    def away(a: int, b: int) -> int:
        return min(abs(a - b), side - abs(a - b)) if version == 2 else abs(a - b)

    for query in range(length):
        for key in range(query + 1):
            (r, c), (key_r, key_c) = divmod(query - TEXT, side), divmod(key - TEXT, side)
            masks["row"][query, key] = key < TEXT or query - key <= side
            masks["col"][query, key] = key < TEXT or c == key_c
            masks["conv"][query, key] = key < TEXT or (away(r, key_r) <= 5 and away(c, key_c) <= 5)
    return masks


@pytest.fixture
def words(source) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = shapes_of_min() if source == "min" else shapes_of_ru()
    state = {name: torch.randn(shape) * (0.2 if len(shape) > 1 else 0.7) for name, shape in shapes.items()}
    if source == "ru":
        state |= {f"transformer.{name}_mask": mask for name, mask in masks_of_ru().items()}
    return state


def pictures(source: str) -> dict[str, Tensor]:
    """A VQGAN's tensors under our names, which are those of both sources."""
    torch.manual_seed(1)
    return {name: torch.randn_like(tensor) * 0.3 for name, tensor in Vqgan(VQGANS[source]).state_dict().items()}


def published(source: str, words: dict[str, Tensor], folder) -> dict[str, Tensor]:
    """Written as published and read as AutoLoader reads a card with parts."""
    extra = {"loss.discriminator.main.0.bias": torch.zeros(1)} if source == "ru" else {}
    torch.save({"state_dict": pictures(source) | extra, "epoch": 3}, folder / "pictures")
    torch.save({"state_dict": words} if source == "min" else words, folder / "words")
    state = weights.read(folder / "words")
    return state | {f"vqgan.{name}": tensor for name, tensor in weights.read(folder / "pictures").items()}


def said(source: str) -> dict:
    return {"image": {"size": 2 * SIDE[source]}, "transformer": {"heads": HEADS}, "caption_dropout": 0.0}


def loaded(state: dict[str, Tensor], config: dict) -> Dalle:
    state, config = to_ours(state, config)
    with weights.blank():
        model = Dalle(DalleConfig.from_dict(config))
    return weights.load(model, state).eval()


# --- a second computation --------------------------------------------------------------------------------------------
def normed(x: Tensor, w: dict, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: Tensor, w: dict, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def by_head(x: Tensor) -> list[Tensor]:
    return list(x.split(WIDTH // HEADS, -1))


def logits_of_min(w: dict, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Of one sample: text (T,), codes (N,) -> logits of words (T - 1, .) and codes (N, .)."""
    x = [w["tok_emb_txt.weight"][token] + w["pos_emb_txt.weight"][place] for place, token in enumerate(text)]
    x += [w["tok_emb_img.weight"][code] + w["pos_emb_img.weight"][place] for place, code in enumerate(codes)]
    x = torch.stack(x)
    for i in range(DEPTH):
        at = f"blocks.{i}."
        y = normed(x, w, at + "ln1")
        queries, keys, values = (by_head(linear(y, w, f"{at}attn.{part}")) for part in ("query", "key", "value"))
        gathered = torch.zeros_like(x)
        for place in range(len(x)):
            heads = []
            for q, k, v in zip(queries, keys, values, strict=True):
                scores = torch.stack([q[place] @ k[earlier] for earlier in range(place + 1)]) / math.sqrt(len(q[0]))
                heads.append(scores.softmax(0) @ v[: place + 1])
            gathered[place] = torch.cat(heads)
        x = x + linear(gathered, w, at + "attn.proj")
        hidden = linear(normed(x, w, at + "ln2"), w, at + "mlp.0")
        x = x + linear(hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2, w, at + "mlp.2")
    x = normed(x, w, "ln_f")
    return x[: TEXT - 1] @ w["head_txt.weight"].T, x[TEXT - 1 : -1] @ w["head_img.weight"].T


def logits_of_ru(w: dict, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """As above, with precision-bottleneck relaxation and hidden scores of -10,000 as published; the logits of words
    without those of the paddings."""
    masks, x = masks_of_ru(), []
    for place, token in enumerate(text.tolist()):
        row = token if token else WORDS + place
        x.append(w["text_embeddings.weight"][row] + w["text_pos_embeddings.weight"][place])
    for place, code in enumerate(codes):
        row, column = divmod(place, SIDE["ru"])
        where = w["image_row_embeddings.weight"][row] + w["image_col_embeddings.weight"][column]
        x.append(w["image_embeddings.weight"][code] + where)
    x = torch.stack(x)
    for i in range(DEPTH):
        at = f"transformer.layers.{i}."
        mask = masks["col" if (i - 1) % 4 == 0 else "row" if i != DEPTH - 1 else "conv"].float()
        mixed = linear(normed(x, w, at + "input_layernorm"), w, at + "attention.query_key_value")
        heads = []
        for q, k, v in zip(*(by_head(part) for part in mixed.split(WIDTH, -1)), strict=True):
            scores = (q / math.sqrt(WIDTH // HEADS)) @ k.T * mask - 10_000 * (1 - mask)
            heads.append((32 * (scores / 32 - scores.max() / 32)).softmax(-1) @ v)
        added = linear(torch.cat(heads, -1), w, at + "attention.dense")
        x = x + normed(added, w, at + "before_first_addition_layernorm")
        h = linear(normed(x, w, at + "post_attention_layernorm"), w, at + "mlp.dense_h_to_4h")
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * h * (1 + 0.044715 * h * h)))
        x = x + normed(linear(h, w, at + "mlp.dense_4h_to_h"), w, at + "before_second_addition_layernorm")
    x = normed(normed(x, w, "transformer.final_layernorm"), w, "to_logits.0")
    x = linear(x, w, "to_logits.1")
    return x[: TEXT - 1, :WORDS], x[TEXT - 1 : -1, WORDS + TEXT :]


# --- properties ------------------------------------------------------------------------------------------------------
@every_source
def test_random_weights_load_strictly_and_give_the_logits_of_the_published_formulas(source, words, tmp_path):
    model = loaded(published(source, words, tmp_path), said(source))
    text, codes = torch.randint(1, WORDS, (2, TEXT)), torch.randint(CODES, (2, SIDE[source] ** 2))
    text[0, 3:] = 0
    with torch.no_grad():
        found = model.transformer.logits(text, codes)
        for sample in range(2):
            expected = (logits_of_min if source == "min" else logits_of_ru)(words, text[sample], codes[sample])
            for ours, theirs in zip(found, expected, strict=True):
                assert theirs.std() > 0.3
                torch.testing.assert_close(ours[sample], theirs, atol=1e-5, rtol=1e-5)


@every_source
def test_the_image_tokenizer_is_in_the_same_model(source, words, tmp_path):
    model = loaded(published(source, words, tmp_path), said(source))
    expected = Vqgan(VQGANS[source]).eval()
    expected.load_state_dict(pictures(source))
    assert model.config.image == model.dvae.config == VQGANS[source]
    with torch.no_grad():
        codes = model.draw(torch.ones(2, TEXT, dtype=torch.int64), [0, 1])
        assert codes.shape == (2, SIDE[source], SIDE[source])
        assert torch.equal(model.dvae.decode(codes), expected.decode(codes))
        image = torch.rand(1, 3, *[2 * SIDE[source]] * 2)
        assert torch.equal(model.dvae.encode(image), expected.encode(image))


@every_source
def test_sizes_come_from_shapes_and_the_rest_from_what_is_said(source, words, tmp_path):
    found = to_ours(published(source, words, tmp_path), said(source) | {"empty": [2, 3], "resolution": 9})[1]
    assert found["caption_dropout"] == 0 and found["empty"] == [2, 3] and "resolution" not in found
    sizes = {"text_vocab": WORDS, "text_length": TEXT, "vocab": CODES, "grid": SIDE[source]}
    sizes |= {"width": WIDTH, "depth": DEPTH, "heads": HEADS}
    assert found["transformer"].items() >= sizes.items()


@every_source
def test_half_precision_stays_and_masks_need_not_be_there(source, words, tmp_path):
    half = {name: tensor.half() for name, tensor in words.items() if "mask" not in name}
    model = loaded(published(source, half, tmp_path), said(source))
    assert {p.dtype for p in model.transformer.parameters()} == {torch.float16}


@every_source
def test_ours_is_read_as_it_is(source, words, tmp_path):
    state, config = to_ours(published(source, words, tmp_path), said(source))
    config = dataclasses.asdict(DalleConfig.from_dict(config | {"guidance": 3.0}))
    again, config_again = to_ours(state, config | {"zoo": 1})
    assert again.keys() == state.keys() and all(again[name] is state[name] for name in state)
    assert config_again == config
    with pytest.raises(WeightsMismatch, match="config.json must lie beside"):
        to_ours(state, {})


# --- weights of another kind -----------------------------------------------------------------------------------------
MISSING = {
    "min": ("blocks.1.attn.key.bias", "blocks.1.qkv.bias"),
    "ru": ("transformer.layers.1.mlp.dense_4h_to_h.weight", "blocks.1.mlp.down.weight"),
}


@every_source
def test_missing_and_left_over_tensors_are_named(source, words, tmp_path):
    theirs, ours = MISSING[source]
    extra = theirs.replace("1", "1.extra")
    del words[theirs]
    with pytest.raises(WeightsMismatch, match=rf"1 of \d+ tensors are missing: transformer\.{ours}"):
        loaded(published(source, words, tmp_path), said(source))
    with pytest.raises(WeightsMismatch, match=rf"left over: .*{extra}"):
        loaded(published(source, words | {extra: torch.zeros(1)}, tmp_path), said(source))


def test_ru_dalles_one_output_layer_is_asked_for(tmp_path):
    words = {name: torch.zeros(shape) for name, shape in shapes_of_ru().items() if not name.startswith("to_logits.1")}
    with pytest.raises(WeightsMismatch, match=r"4 of \d+ tensors are missing: transformer.text_head.weight"):
        loaded(published("ru", words, tmp_path), said("ru"))


def test_ru_dalles_second_version_is_told_by_its_mask(tmp_path):
    words = {name: torch.zeros(shape) for name, shape in shapes_of_ru().items()}
    words["transformer.conv_mask"] = masks_of_ru(version=2)["conv"]
    with pytest.raises(WeightsMismatch, match="take pytorch_model_v3.bin"):
        to_ours(published("ru", words, tmp_path), said("ru"))


@every_source
def test_what_is_not_there_is_asked_for(source, words, tmp_path):
    state = published(source, words, tmp_path)
    alone = {name: tensor for name, tensor in state.items() if not name.startswith("vqgan.")}
    with pytest.raises(WeightsMismatch, match=f"lacks its image tokenizer: .* of {source}DALL-E"):
        to_ours(alone, said(source))
    with pytest.raises(WeightsMismatch, match="how many heads"):
        to_ours(state, {})
    with pytest.raises(WeightsMismatch, match=r"these 0 tensors \(none, ...\) are not a DALL-E"):
        to_ours({name: tensor for name, tensor in state.items() if name not in alone}, said(source))
