from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from zoo.errors import BatchTooSmall
from zoo.models.clip import MAX_LOGIT_SCALE, Clip, ClipConfig, TextConfig, VitConfig, _Bounded, sigmoid_loss
from zoo.models.clip_bert import BertConfig
from zoo.models.clip_resnet import ResNetConfig

ROOT = Path(__file__).parents[2]
VIT = VitConfig(size=16, patch=4, width=32, depth=2, heads=4)
TEXT = TextConfig(context=12, vocab=40, width=32, depth=2, heads=4)
TINY = ClipConfig(embed=16, image=VIT, text=TEXT)
RESNET = dataclasses.replace(TINY, image=ResNetConfig(size=32, layers=(1, 1, 1, 1), width=4))
BERT = dataclasses.replace(TINY, text=BertConfig(vocab=40, width=32, depth=2, heads=4, positions=12, context=12))


def captions(count: int, context: int = 12) -> torch.Tensor:
    """Captions of different lengths that end with the largest id, 39, and are padded with 0."""
    tokens = torch.randint(1, 38, (count, context))
    for row, caption in enumerate(tokens):
        end = 2 + row % (context - 4)
        caption[end], caption[end + 1 :] = 39, 0
    return tokens


def batch(config: ClipConfig, count: int = 8) -> dict[str, torch.Tensor]:
    return {"image": torch.randn(count, 3, config.image.size, config.image.size), "text": captions(count)}


def gradients(model: Clip) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def _same_numbers_each_time():
    torch.manual_seed(0)


# --- config ---
@pytest.mark.parametrize("config", [TINY, RESNET, BERT], ids=["vit", "resnet", "bert"])
def test_a_config_survives_its_dict(config: ClipConfig):
    assert ClipConfig.from_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize("sizes", [{"widht": 1}, {"image": {"widht": 1}}, {"text": {"pad": 0, "widht": 1}}])
def test_an_unknown_field_is_refused(sizes: dict):
    with pytest.raises(TypeError, match="widht"):
        ClipConfig.from_dict(sizes)


@pytest.mark.parametrize("config", [TINY, RESNET, BERT], ids=["vit", "resnet", "bert"])
def test_the_state_is_all_that_a_model_holds(config: ClipConfig):
    with torch.device("meta"):
        model = Clip(config)
    held = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert held == set(model.state_dict())


# --- towers ---
@pytest.mark.parametrize(
    "tensor", ["image.positions", "image.project.weight", "image.pool.positions", "text.positions"]
)
def test_towers_start_as_published(tensor: str):
    """Random, of a deviation of 1 / sqrt(width), but for text positions, of 0.01."""
    model = Clip(RESNET if "pool" in tensor else TINY)
    found = model.get_parameter(tensor)
    expected = 0.01 if tensor == "text.positions" else found.shape[-1] ** -0.5
    assert found.std().item() == pytest.approx(expected, rel=0.2)


def test_text_after_the_end_token_changes_nothing():
    model, tokens = Clip(TINY).eval(), captions(4)
    noisy = torch.where(tokens == 0, torch.randint(1, 38, tokens.shape), tokens)
    torch.testing.assert_close(model.encode_text(noisy), model.encode_text(tokens))


def test_text_is_trimmed_to_the_longest_caption():
    model, tokens = Clip(TINY).eval(), captions(3)
    seen = []
    model.text.transformer.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    trimmed = model.encode_text(tokens)
    x = model.text.transformer(model.text.embed(tokens) + model.text.positions)
    whole = model.text.project(model.text.norm_out(x[torch.arange(3), tokens.argmax(-1)]))
    assert seen == [5, 12]
    torch.testing.assert_close(trimmed, whole)


def test_patch_dropout_keeps_the_class_token_and_each_pictures_own_patches():
    tower = Clip(dataclasses.replace(TINY, image=dataclasses.replace(VIT, patch_dropout=0.5))).image
    places = torch.arange(17.0).expand(6, 17)[..., None]  # 1 + 16 patches, each its own number
    kept = tower.drop_patches(places)[..., 0]
    assert kept.shape == (6, 9)
    assert bool((kept[:, 0] == 0).all())
    assert all(row.unique().numel() == 9 for row in kept)
    assert kept.sort().values.unique(dim=0).shape[0] > 1


def test_patches_are_dropped_only_while_training():
    model = Clip(dataclasses.replace(TINY, image=dataclasses.replace(VIT, patch_dropout=0.5)))
    seen, image = [], torch.randn(2, 3, 16, 16)
    model.image.transformer.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    model.train().encode_image(image)
    model.eval().encode_image(image)
    assert seen == [9, 17]


def test_similarity_is_the_scaled_cosine():
    model, (image, text) = Clip(TINY).eval(), batch(TINY, 3).values()
    cosine = F.cosine_similarity(model.encode_image(image)[:, None], model.encode_text(text[:2])[None], dim=-1)
    torch.testing.assert_close(model.similarity(image, text[:2]), model.logit_scale.exp() * cosine)


# --- losses ---
def test_the_softmax_loss_is_the_mean_of_both_directions():
    model, pairs = Clip(TINY).eval(), batch(TINY, 4)
    logits, own = model.similarity(pairs["image"], pairs["text"]), torch.arange(4)
    expected = -(logits.log_softmax(1)[own, own].mean() + logits.log_softmax(0)[own, own].mean()) / 2
    torch.testing.assert_close(model(**pairs)["loss"], expected)


def test_the_sigmoid_loss_is_that_of_siglip():
    model, pairs = Clip(dataclasses.replace(TINY, loss="sigmoid")).eval(), batch(TINY, 4)
    found = model(**pairs)
    total = 0.0
    for row in range(4):
        for column in range(4):
            sign = 1 if row == column else -1
            total += math.log(1 + math.exp(-sign * found["logits"][row, column].item()))
    assert found["loss"].item() == pytest.approx(total / 4, rel=1e-5)
    assert model.logit_scale.exp().item() == pytest.approx(10)
    assert model.logit_bias.item() == -10


def test_the_sigmoid_loss_knows_the_column_of_each_row():
    logits = torch.full((2, 4), -50.0)
    logits[0, 2] = logits[1, 3] = 50.0
    assert sigmoid_loss(logits, torch.tensor([2, 3])) < 1e-6
    assert sigmoid_loss(logits, torch.tensor([0, 1])) > 10


def test_one_pair_is_too_few():
    with pytest.raises(BatchTooSmall, match="batch_size"):
        Clip(TINY)(**batch(TINY, 1))


@pytest.mark.parametrize(("start", "end"), [(7.0, MAX_LOGIT_SCALE), (-1.0, 0.0), (3.0, 3.0)])
def test_the_temperature_is_clamped_while_training(start: float, end: float):
    """In the result and not in the parameter, of which a rank may hold nothing."""
    model, at_the_end = Clip(TINY), Clip(TINY)
    at_the_end.load_state_dict(model.state_dict())
    model.logit_scale.data.fill_(start)
    at_the_end.logit_scale.data.fill_(end)
    data = batch(TINY, 2)
    torch.testing.assert_close(model.train()(**data)["logits"], at_the_end.train()(**data)["logits"])
    assert torch.equal(model.eval()(**data)["logits"], at_the_end.eval()(**data)["logits"]) == (start == end)
    assert model.logit_scale.item() == start


@pytest.mark.parametrize(
    ("start", "grad", "passed"), [(7.0, -1.0, 0.0), (7.0, 1.0, 1.0), (-1.0, 1.0, 0.0), (3.0, -1.0, -1.0)]
)
def test_a_clamped_temperature_learns_only_to_come_back(start: float, grad: float, passed: float):
    x = torch.tensor(start, requires_grad=True)
    _Bounded.apply(x, 0.0, MAX_LOGIT_SCALE).backward(torch.tensor(grad))
    assert x.grad.item() == passed


# --- memory ---
@pytest.mark.parametrize(
    "config",
    [TINY, dataclasses.replace(TINY, loss="sigmoid"), BERT, RESNET],
    ids=["softmax", "sigmoid", "bert", "resnet"],
)
def test_the_loss_of_chunks_is_that_of_the_whole_batch(config: ClipConfig):
    """But for batch norm, which normalises by its chunk; frozen, as here, it does not."""
    model, pairs, found = Clip(config).double(), batch(config, 7), []
    if config is RESNET:
        model.train().image.eval()
    for model.chunk in (None, 3):
        model.zero_grad()
        loss = model(**pairs)["loss"]
        loss.backward()
        found.append((loss, gradients(model)))
    torch.testing.assert_close(found[0], found[1])


def test_chunks_move_batch_norm_statistics_once_each():
    model, pairs = Clip(RESNET), batch(RESNET, 6)
    plain = Clip(RESNET)
    plain.load_state_dict(model.state_dict())
    model.chunk = 3
    model(**pairs)["loss"].backward()
    for part in pairs["image"].split(3):
        plain.encode_image(part)
    assert model.image.bn1.num_batches_tracked == 2
    torch.testing.assert_close(model.image.bn1.running_mean, plain.image.bn1.running_mean)
    torch.testing.assert_close(model.image.layers[3][0].bn3.running_var, plain.image.layers[3][0].bn3.running_var)


def test_chunks_drop_the_same_patches_in_both_passes():
    model = Clip(dataclasses.replace(TINY, image=dataclasses.replace(VIT, patch_dropout=0.5)))
    pairs, seen = batch(TINY, 6), []
    original = model.image.drop_patches
    model.image.drop_patches = lambda x: seen.append(original(x)) or seen[-1]
    model.chunk = 3
    model(**pairs)["loss"].backward()
    assert len(seen) == 4
    for first, again in ((0, 3), (1, 2)) if torch.equal(seen[0], seen[3]) else ((0, 2), (1, 3)):
        torch.testing.assert_close(seen[first], seen[again])


@pytest.mark.parametrize("config", [TINY, RESNET, BERT], ids=["vit", "resnet", "bert"])
def test_checkpointing_reaches_both_towers_and_changes_no_gradient(config: ClipConfig):
    model, pairs, found = Clip(config), batch(config, 4), []
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for enable in (False, True):
        model.load_state_dict(start)
        model.set_grad_checkpointing(enable)
        assert {m.checkpointing for m in model.modules() if hasattr(m, "checkpointing")} == {enable}
        model.zero_grad()
        model(**pairs)["loss"].backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[0], found[1])


# --- locking ---
@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("config", [TINY, RESNET, BERT], ids=["vit", "resnet", "bert"])
@pytest.mark.parametrize("unlocked", [0, 1, 2, 5])  # 5 is more than a tiny transformer has
def test_lock_freezes_what_it_says(config: ClipConfig, tower: str, unlocked: int):
    model = Clip(config)
    model.lock(tower, unlocked)
    groups = getattr(model, tower).groups
    still_open = {id(p) for group in groups[max(0, len(groups) - unlocked) :] for p in group.parameters()}
    for parameter in getattr(model, tower).parameters():
        assert parameter.requires_grad == (id(parameter) in still_open)
    other = model.text if tower == "image" else model.image
    assert all(p.requires_grad for p in other.parameters())
    assert model.logit_scale.requires_grad


def test_locked_batch_norms_stand_still_while_training():
    model = Clip(RESNET)
    model.lock("image", 1)
    before = {name: tensor.clone() for name, tensor in model.image.state_dict().items()}
    model.train()(**batch(RESNET, 4))["loss"].backward()
    for name, tensor in model.image.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert model.image.pool.training
    assert not model.image.layers[0].training
    assert model.text.training


# --- many processes ---
WORKER = """
import sys
import torch
import torch.distributed as dist
from zoo.models.clip import Clip

rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
given = torch.load(f"{folder}/given.pt", weights_only=False)
model = Clip(given["config"])
model.load_state_dict(given["state"])
found = model(**{name: rows[rank * 3 : rank * 3 + 3] for name, rows in given["batch"].items()})
found["loss"].backward()
grads = {name: p.grad for name, p in model.named_parameters()}
torch.save({"loss": found["loss"].detach(), "grads": grads, "logits": found["logits"].detach()}, f"{folder}/{rank}.pt")
"""


def test_two_processes_find_the_loss_and_gradients_of_one(tmp_path):
    model, pairs = Clip(TINY), batch(TINY, 6)
    torch.save({"config": TINY, "state": model.state_dict(), "batch": pairs}, tmp_path / "given.pt")
    command = [sys.executable, "-c", WORKER]
    runs = [subprocess.Popen([*command, str(rank), str(tmp_path)], cwd=ROOT) for rank in range(2)]
    found = model(**pairs)
    found["loss"].backward()
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close((first["loss"] + second["loss"]) / 2, found["loss"].detach())
    torch.testing.assert_close(torch.cat([first["logits"], second["logits"]]), found["logits"].detach())
    for name, grad in gradients(model).items():
        torch.testing.assert_close((first["grads"][name] + second["grads"][name]) / 2, grad, msg=name)
