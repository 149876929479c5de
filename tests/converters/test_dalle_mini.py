"""The two published layouts of DALL-E mini: min-dalle's files of torch, and the msgpack file of flax.

The transformer here is written from the published description alone, head by head, over min-dalle's names, so that what
is made of the weights is compared with a second computation, not with itself.
"""

from __future__ import annotations

import dataclasses
import math
import re

import msgpack
import numpy as np
import pytest
import torch
from torch import Tensor

from zoo import weights
from zoo.converters.dalle_mini import to_ours
from zoo.errors import WeightsMismatch
from zoo.models.dalle import Dalle
from zoo.models.dalle_mini import DalleMiniConfig, dalle_mini
from zoo.models.vqgan import Vqgan, VqganConfig

WIDTH, HEADS, DEPTH, HIDDEN, VOCAB, CONTEXT, ROWS, GRID, START = 32, 4, 2, 20, 50, 9, 25, 3, 20
CODES = 19  # fewer than rows before the start token, so that each of the two is looked at
SAID = {"encoder_attention_heads": HEADS, "decoder_start_token_id": START, "image_vocab_size": ROWS - 1}
SAID |= {"d_model": WIDTH, "init_std": 0.01}
VQGAN = VqganConfig(
    size=2 * GRID,
    widths=(32, 32),
    blocks=1,
    attention=(1,),
    latent=8,
    vocab=CODES,
    code_width=8,
    black=0.0,
    encoder=False,
    codebook=0.25,
    commitment=1.0,
)
STACKED = {"encoder": "FlaxBartEncoderLayers", "decoder": "FlaxBartDecoderLayers"}


# --- the weights -----------------------------------------------------------------------------------------------------
def attention(name: str) -> dict:
    return {f"{name}.{part}_proj.weight": (WIDTH, WIDTH) for part in ("q", "k", "v", "out")}


def shapes(half: str) -> dict[str, tuple[int, ...]]:
    """min-dalle's names for a half, and the shapes of their tensors."""
    own = {"pre_self_attn_layer_norm.bias": (WIDTH,), **attention("self_attn")}
    own |= {f"self_attn_layer_norm.{part}": (WIDTH,) for part in ("weight", "bias")}
    if half == "decoder":
        own |= {"pre_encoder_attn_layer_norm.bias": (WIDTH,), **attention("encoder_attn")}
        own |= {f"encoder_attn_layer_norm.{part}": (WIDTH,) for part in ("weight", "bias")}
    own |= {"glu.ln0.bias": (WIDTH,), "glu.fc0.weight": (HIDDEN, WIDTH), "glu.fc1.weight": (HIDDEN, WIDTH)}
    own |= {"glu.ln1.bias": (HIDDEN,), "glu.fc2.weight": (WIDTH, HIDDEN)}
    rows, length = (VOCAB, CONTEXT) if half == "encoder" else (ROWS, GRID**2)
    ends = {"embed_tokens.weight": (rows, WIDTH), "embed_positions.weight": (length, WIDTH), "final_ln.bias": (WIDTH,)}
    ends |= {f"layernorm_embedding.{part}": (WIDTH,) for part in ("weight", "bias")}
    ends |= {"lm_head.weight": (ROWS, WIDTH)} if half == "decoder" else {}
    return ends | {f"layers.{i}.{name}": shape for i in range(DEPTH) for name, shape in own.items()}


@pytest.fixture
def halves() -> dict[str, dict[str, Tensor]]:
    torch.manual_seed(0)
    return {
        half: {name: torch.randn(shape) * (0.3 if len(shape) > 1 else 1) for name, shape in shapes(half).items()}
        for half in ("encoder", "decoder")
    }


def pictures() -> dict[str, Tensor]:
    """A VQGAN's tensors under our names, which are taming's."""
    torch.manual_seed(1)
    return {name: torch.randn_like(tensor) for name, tensor in Vqgan(VQGAN).state_dict().items()}


def below(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


# Files are written and read as AutoLoader reads a card with parts.
def of_min_dalle(halves: dict, folder) -> dict[str, Tensor]:
    state = {}
    detoker = {name.replace("quantize.embedding", "embedding"): tensor for name, tensor in pictures().items()}
    for part, tensors in {**halves, "detoker": detoker}.items():
        torch.save(tensors, folder / f"{part}.pt")
        prefix = "vqgan." if part == "detoker" else f"{part}."
        state |= below(prefix, weights.read(folder / f"{part}.pt"))
    return state


FLAX_NAMES = {
    "pre_self_attn_layer_norm": "LayerNorm_0",
    "self_attn": "FlaxBartAttention_0",
    "self_attn_layer_norm": "LayerNorm_1",
    "pre_encoder_attn_layer_norm": "LayerNorm_2",
    "encoder_attn": "FlaxBartAttention_1",
    "encoder_attn_layer_norm": "LayerNorm_3",
    "glu": "GLU_0",
    **{"ln0": "LayerNorm_0", "ln1": "LayerNorm_1", "fc0": "Dense_0", "fc1": "Dense_1", "fc2": "Dense_2"},
}


def to_flax(name: str, tensor: Tensor) -> tuple[list[str], np.ndarray]:
    *path, last = name.split(".")
    if path[0].startswith("embed"):
        return [*path, "embedding"], tensor.numpy()
    if last == "weight" and tensor.ndim == 2:
        return [*(FLAX_NAMES.get(part, part) for part in path), "kernel"], tensor.numpy().T
    return [*(FLAX_NAMES.get(part, part) for part in path), "scale" if last == "weight" else "bias"], tensor.numpy()


def write_flax(leaves: dict[tuple[str, ...], np.ndarray], path) -> None:
    tree: dict = {}
    for (*names, last), leaf in leaves.items():
        branch = tree
        for name in names:
            branch = branch.setdefault(name, {})
        branch[last] = msgpack.ExtType(1, msgpack.packb((leaf.shape, leaf.dtype.name, leaf.tobytes())))
    path.write_bytes(msgpack.packb(tree))


def flax_pictures() -> dict[tuple[str, ...], np.ndarray]:
    leaves = {}
    for name, tensor in pictures().items():
        *path, kind = re.sub(r"\b(\w+)\.(\d+)\b", r"\1_\2", name).split(".")
        if kind == "weight":
            kind = "scale" if tensor.ndim == 1 else "kernel" if tensor.ndim == 4 else "embedding"
        leaves[(*path, kind)] = (tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor).numpy()
    return leaves


def of_flax(halves: dict, folder, stacked: bool = True, top: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The layers of a half stacked along a first axis, or each under its own name."""
    leaves: dict[tuple[str, ...], np.ndarray] = {}
    for half, tensors in halves.items():
        for name, tensor in tensors.items():
            if name == "lm_head.weight":
                leaves[(*top, "lm_head", "kernel")] = tensor.numpy().T
            elif not name.startswith("layers."):
                path, leaf = to_flax(name, tensor)
                leaves[(*top, "model", half, *path)] = leaf
            elif not stacked:
                path, leaf = to_flax(name.split(".", 2)[2], tensor)
                leaves[(*top, "model", half, "layers", f"{STACKED[half][:-1]}_{name.split('.')[1]}", *path)] = leaf
            elif name.startswith("layers.0."):
                path, _ = to_flax(name.split(".", 2)[2], tensor)
                layers = [to_flax(name, tensors[name.replace("s.0.", f"s.{i}.", 1)])[1] for i in range(DEPTH)]
                leaves[(*top, "model", half, "layers", STACKED[half], *path)] = np.stack(layers)
    write_flax(leaves, folder / "flax_model.msgpack")
    write_flax(flax_pictures(), folder / "vqgan.msgpack")
    return weights.read(folder / "flax_model.msgpack") | below("vqgan.", weights.read(folder / "vqgan.msgpack"))


LAYOUTS = {
    "min-dalle": of_min_dalle,
    "flax": of_flax,
    "flax, not stacked": lambda halves, folder: of_flax(halves, folder, stacked=False),
    "flax, in params": lambda halves, folder: of_flax(halves, folder, top=("params",)),
}


# --- the network, by the description alone ---------------------------------------------------------------------------
def norm(x: Tensor, w: dict, name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    x = centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt()
    return x * w.get(f"{name}.weight", 1) + w[f"{name}.bias"]


def attend(x: Tensor, source: Tensor, w: dict, name: str, allowed: Tensor) -> Tensor:
    q, k, v = (
        x @ w[f"{name}.q_proj.weight"].T,
        source @ w[f"{name}.k_proj.weight"].T,
        source @ w[f"{name}.v_proj.weight"].T,
    )
    heads = []
    for head in range(HEADS):
        part = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        scores = q[:, part] @ k[:, part].T / math.sqrt(WIDTH // HEADS)
        scores = scores.exp() * allowed
        heads.append(scores / scores.sum(-1, keepdim=True) @ v[:, part])
    return torch.cat(heads, -1) @ w[f"{name}.out_proj.weight"].T


def gated(x: Tensor, w: dict) -> Tensor:
    x = norm(x, w, "glu.ln0")
    gate = x @ w["glu.fc0.weight"].T
    gate = gate * (1 + torch.erf(gate / math.sqrt(2))) / 2
    return norm(gate * (x @ w["glu.fc1.weight"].T), w, "glu.ln1") @ w["glu.fc2.weight"].T


def reference(halves: dict, tokens: Tensor, codes: Tensor) -> Tensor:
    """One caption (T,) and its codes (N,) -> logits (N, V), in double precision."""
    halves = {half: {name: t.double() for name, t in tensors.items()} for half, tensors in halves.items()}
    words = (tokens != 1).double()[None]
    before = torch.cat([torch.tensor([START]), codes[:-1]])
    past = torch.ones(len(codes), len(codes)).tril()
    context = torch.zeros(0)
    for half, ids in (("encoder", tokens), ("decoder", before)):
        whole = halves[half]
        x = norm(whole["embed_tokens.weight"][ids] + whole["embed_positions.weight"], whole, "layernorm_embedding")
        for i in range(DEPTH):
            w = {name.split(".", 2)[2]: t for name, t in whole.items() if name.startswith(f"layers.{i}.")}
            y = norm(x, w, "pre_self_attn_layer_norm")
            allowed = words if half == "encoder" else past
            x = x + norm(attend(y, y, w, "self_attn", allowed), w, "self_attn_layer_norm")
            if half == "decoder":
                y = norm(x, w, "pre_encoder_attn_layer_norm")
                x = x + norm(attend(y, context, w, "encoder_attn", words), w, "encoder_attn_layer_norm")
            x = x + gated(x, w)
        context = norm(x, whole, "final_ln")
    return context @ halves["decoder"]["lm_head.weight"].T


def loaded(state: dict, config: dict) -> Dalle:
    ours, sizes = to_ours(state, config)
    with weights.blank():
        model = dalle_mini(DalleMiniConfig.from_dict(sizes))
    return weights.load(model, ours).eval()


# --- reading ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_loads_strictly_and_gives_the_logits_of_the_description(halves, tmp_path, layout):
    model = loaded(LAYOUTS[layout](halves, tmp_path), SAID).transformer
    tokens = torch.tensor([[0, 7, 30, 2, 1, 1, 1, 1, 1], [0, 4, 5, 6, 7, 8, 9, 10, 2]])
    codes = torch.randint(0, CODES, (2, GRID**2))
    with torch.no_grad():
        found = model.logits(tokens, codes)
    expected = torch.stack([reference(halves, *row) for row in zip(tokens, codes, strict=True)])
    assert expected.abs().max() > 3
    torch.testing.assert_close(found.double(), expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


def test_half_precision_is_kept(halves, tmp_path):
    halves = {half: {name: tensor.half() for name, tensor in tensors.items()} for half, tensors in halves.items()}
    for layout in (of_min_dalle, of_flax):
        state = to_ours(layout(halves, tmp_path), SAID)[0]
        assert {t.dtype for name, t in state.items() if name.startswith("transformer.")} == {torch.float16}


def test_all_layouts_give_one_state_and_one_config(halves, tmp_path):
    found = []
    for name, layout in LAYOUTS.items():
        (tmp_path / name).mkdir()  # of its own, since tensors stay on the pages of their file
        found.append(to_ours(layout(halves, tmp_path / name), SAID))
    for state, config in found:
        assert config == found[0][1] and state.keys() == found[0][0].keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in found[0][0].items())
    vqgan = {name: tensor for name, tensor in found[0][0].items() if name.startswith("dvae.")}
    assert vqgan.keys() == below("dvae.", pictures()).keys()
    assert all(torch.equal(vqgan[f"dvae.{name}"], tensor) for name, tensor in pictures().items())


def test_sizes_come_from_shapes_and_the_rest_from_the_config(halves, tmp_path):
    config = to_ours(of_min_dalle(halves, tmp_path), SAID)[1]
    sizes = dict(text_length=CONTEXT, text_vocab=VOCAB, grid=GRID, vocab=CODES, rows=ROWS, width=WIDTH, depth=DEPTH)
    assert config["transformer"] == sizes | dict(hidden=HIDDEN, heads=HEADS, start=START, pad=1, init_std=0.01)
    assert config["image"] == dataclasses.asdict(VQGAN)


def test_without_a_config_of_these_weights_the_published_start_and_heads_of_64_are_taken(halves, tmp_path):
    """min-dalle's folder holds the config.json of mega, beside the files of mini."""
    halves = {
        half: {name: t.repeat(4, *[1] * (t.ndim - 1)) for name, t in tensors.items()}
        for half, tensors in halves.items()
    }
    for tensors in halves.values():  # a width of 128
        for name, tensor in tensors.items():
            if name.startswith("embed") or name == "lm_head.weight":
                tensors[name] = tensor[: len(tensor) // 4].repeat(1, 4)
    mega = {"d_model": 2048, "encoder_attention_heads": 32, "decoder_start_token_id": 7, "init_std": 0.5}
    for config in ({}, mega):
        found = to_ours(of_min_dalle(halves, tmp_path), config)[1]["transformer"]
        assert (found["width"], found["heads"], found["start"], found["init_std"]) == (128, 2, 16384, 0.02)


def test_ours_is_read_as_it_is(halves, tmp_path):
    state, config = to_ours(of_min_dalle(halves, tmp_path), SAID)
    config |= {"caption_dropout": 0.2, "code_dropout": 0.5, "empty": [0, 3], "guidance": 4.0}
    config["transformer"] |= {"start": 21, "pad": 4, "init_std": 0.3, "heads": 2}
    again, config_again = to_ours(state, config)
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    assert config_again == config
    assert dataclasses.asdict(DalleMiniConfig.from_dict(config)) == config | {"empty": (0, 3)}


# --- weights of another kind -----------------------------------------------------------------------------------------
def test_a_tensor_that_no_layout_has_keeps_its_name_and_is_reported(halves, tmp_path):
    state = of_min_dalle(halves, tmp_path) | {"decoder.layers.0.self_attn.q_proj.bias": torch.zeros(WIDTH)}
    with pytest.raises(WeightsMismatch, match=r"1 are left over: decoder.layers.0.self_attn.q_proj.bias"):
        loaded(state, SAID)


def test_a_missing_tensor_is_reported(halves, tmp_path):
    del halves["decoder"]["layers.1.glu.fc1.weight"]
    with pytest.raises(
        WeightsMismatch, match=r"1 of \d+ tensors are missing: transformer.decoder.blocks.1.gated.up.weight"
    ):
        loaded(of_min_dalle(halves, tmp_path), SAID)


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_one_half_alone_says_which_files_are_needed(halves, tmp_path, half):
    with pytest.raises(WeightsMismatch, match="encoder.pt, decoder.pt and detoker.pt"):
        to_ours(of_min_dalle({half: halves[half]}, tmp_path), SAID)


@pytest.mark.parametrize("layout", [of_min_dalle, of_flax])
def test_a_missing_vqgan_is_asked_for(halves, tmp_path, layout):
    state = {name: t for name, t in layout(halves, tmp_path).items() if not name.startswith("vqgan.")}
    with pytest.raises(WeightsMismatch, match="lacks its VQGAN: put detoker.pt"):
        to_ours(state, SAID)


@pytest.mark.parametrize("field", [{"ln_positions": "swinv2"}, {"activation_function": "gelu_new"}])
def test_a_config_of_another_network_is_refused(halves, tmp_path, field):
    with pytest.raises(WeightsMismatch, match=next(iter(field))):
        loaded(of_flax(halves, tmp_path), SAID | field)
