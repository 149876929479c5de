from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed
import transformers
from torch import Tensor, nn

import zoo
from zoo.errors import SettingsError
from zoo.models.clip import Clip, ClipConfig, TextConfig, VitConfig
from zoo.optimization import Report
from zoo.optimization.measure import Measure

TOKENS = torch.randint(98, (3, 9), generator=torch.Generator().manual_seed(0))
SMALL = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)


class Mixed(nn.Module):
    """A user's model with something of every kind; `weights` makes its outputs depend on attention weights."""

    def __init__(self, weights: bool = False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3))
        layer = nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.gate, self.up = nn.Linear(16, 16), nn.Linear(16, 16)
        self.weights = weights

    def forward(self, image: Tensor) -> Tensor:
        x = self.encoder(self.stem(image).flatten(2).transpose(1, 2))
        x, weights = self.attention(x, x, x)
        return self.gate(x) * self.up(x) + (weights.mean() if self.weights else 0)


def mixed() -> tuple[nn.Module, dict[str, Tensor]]:
    return Mixed(), {"image": torch.randn(2, 3, 8, 8)}


def clip() -> tuple[nn.Module, dict[str, Tensor]]:
    text = SMALL | dict(vocab_size=99, eos_token_id=98, bos_token_id=97, pad_token_id=0)
    config = transformers.CLIPConfig(text_config=text, vision_config=SMALL | dict(image_size=8, patch_size=4))
    config._attn_implementation = "eager"
    images = torch.randn(3, 3, 8, 8)
    return transformers.CLIPModel(config), {"input_ids": TOKENS, "pixel_values": images}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    sizes = dict(n_embd=16, n_layer=2, n_head=2, vocab_size=99, n_positions=9, bos_token_id=98, eos_token_id=98)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, attn_implementation="eager"))
    return model, {"input_ids": TOKENS, "labels": TOKENS}


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.BertConfig(**SMALL, vocab_size=99, attn_implementation="eager")
    return transformers.BertModel(config), {
        "input_ids": TOKENS,
        "attention_mask": (TOKENS > 30).long().index_fill(1, torch.tensor(0), 1),
    }


MODELS = pytest.mark.parametrize("build", [mixed, clip, gpt2, bert])


@pytest.fixture(autouse=True)
def faster(monkeypatch: pytest.MonkeyPatch):
    """Every replacement counts as faster: what these tests hold must not hang on the time of day."""
    monkeypatch.setattr(Measure, "gain", lambda measure, make: 2.0)


def built(build) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, batch = build()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.MultiheadAttention):
            setattr(module, "p" if isinstance(module, nn.Dropout) else "dropout", 0.0)
    return model.train(), batch


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    outputs = model(**batch)
    if isinstance(outputs, Tensor):
        return outputs.square().mean()
    values = [outputs["loss"]] if "loss" in outputs else [outputs[0].square().mean()]
    return values[0]


def trained(model: nn.Module, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """One step -> the gradients; the weights are the model's."""
    loss(model, batch).backward()
    optimizer.step()
    return [p.grad for p in model.parameters() if p.grad is not None]


def kept(report: Report) -> list[str]:
    return [row.name for row in report.rows if row.kept]


@MODELS
def test_an_optimizer_made_before_trains_the_optimized_model_as_the_plain_one(build):
    model, batch = built(build)
    plain = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-3) for m in (plain, model)]
    report = zoo.optimize(model, batch)
    assert kept(report), str(report)
    expected = trained(plain, batch, optimizers[0])
    torch.testing.assert_close(trained(model, batch, optimizers[1]), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-5)


@MODELS
def test_modules_parameters_and_state_stay_the_same_objects_and_undo_restores_all(build):
    model, batch = built(build)
    modules = {path: (m, type(m), dict(vars(m))) for path, m in model.named_modules()}
    configs = [m.config._attn_implementation for m in model.modules() if hasattr(m, "set_attn_implementation")]
    state, parameters = {k: t.clone() for k, t in model.state_dict().items()}, list(map(id, model.parameters()))
    with zoo.optimize(model, batch) as report:
        assert kept(report)
        assert list(map(id, model.parameters())) == parameters
        assert list(model.state_dict()) == list(state)
    for path, module in model.named_modules():
        assert (module, type(module)) == modules[path][:2]
        assert vars(module).keys() == modules[path][2].keys()
    again = [m.config._attn_implementation for m in model.modules() if hasattr(m, "set_attn_implementation")]
    assert again == configs
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    report.undo()  # a second time does nothing


@MODELS
def test_an_optimized_model_can_be_copied_saved_and_loaded(build):
    model, batch = built(build)
    zoo.optimize(model, batch)
    other, _ = built(build)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.1)
    file = io.BytesIO()
    torch.save(other.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True), strict=True)
    expected = loss(other, batch)
    torch.testing.assert_close(loss(model, batch), expected)
    torch.testing.assert_close(loss(copy.deepcopy(model), batch), expected)


def test_ddp_wraps_an_optimized_model(tmp_path):
    model, batch = built(mixed)
    plain = copy.deepcopy(model)
    zoo.optimize(model, batch)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(SettingsError, match="before DDP wraps it"):
            zoo.optimize(wrapped, batch)
        loss(wrapped, batch).backward()
    finally:
        torch.distributed.destroy_process_group()
    loss(plain, batch).backward()
    found = [p.grad for p in model.parameters()]
    torch.testing.assert_close(found, [p.grad for p in plain.parameters()], rtol=1e-5, atol=1e-5)


def test_every_kind_of_replacement_is_found_in_a_mixed_model():
    model, batch = built(mixed)
    report = zoo.optimize(model, batch)
    assert [row.place for row in report.rows] == [
        "encoder.layers.0.self_attn and 1 more",
        "attention",
        "{gate,up}",
        "stem.0 and 1 more",
    ]
    assert "2.00x  kept" in str(report) and "fused=True" in str(report)


def test_what_is_not_faster_is_undone_unless_it_was_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Measure, "gain", lambda measure, make: 1.0)
    model, batch = built(mixed)
    classes = [type(m) for m in model.modules()]
    report = zoo.optimize(model, batch)
    assert kept(report) == [] and {row.why for row in report.rows} == {"not faster"}
    assert [type(m) for m in model.modules()] == classes
    assert kept(zoo.optimize(model, batch, channels_last=True)) == ["channels_last convolutions"]


def test_a_replacement_that_differs_is_undone_and_the_distance_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "zoo.optimization.layers.ChannelsLastConv2d.forward", lambda conv, x: nn.Conv2d.forward(conv, x) + 0.1
    )
    model, batch = built(mixed)
    row = zoo.optimize(model, batch).rows[-1]
    assert not row.kept and row.why.startswith("differs by ") and type(model.stem[0]) is nn.Conv2d


def test_attention_whose_weights_are_used_is_left_alone():
    torch.manual_seed(0)
    model = Mixed(weights=True)
    row = zoo.optimize(model, {"image": torch.randn(2, 3, 8, 8)}).rows[1]
    assert not row.kept and row.why.startswith("fails, AttributeError")
    assert type(model.attention) is nn.MultiheadAttention


def test_without_a_batch_only_equals_by_construction_are_made():
    model, _ = built(mixed)
    report = zoo.optimize(model)
    assert kept(report) == ["SDPA in torch's transformer layers"]
    assert {row.gain for row in report.rows} == {None}
    assert {row.why for row in report.rows} == {"not measured", "not measured, give a batch"}
    assert kept(zoo.optimize(gpt2()[0])) == ["SDPA for eager attention of transformers"]


def test_attention_scores_that_a_config_asks_for_are_kept():
    model, batch = built(gpt2)
    model.config.output_attentions = True
    assert zoo.optimize(model, batch).rows == ()


def test_channels_last_can_be_forbidden():
    model, batch = built(mixed)
    assert all("channels_last" not in row.name for row in zoo.optimize(model, batch, channels_last=False).rows)


def test_our_own_models_have_nothing_to_replace():
    image = VitConfig(size=8, patch=4, width=16, depth=1, heads=2)
    model = Clip(ClipConfig(embed=16, image=image, text=TextConfig(width=16, depth=1, heads=2)))
    assert str(zoo.optimize(model)).startswith("nothing to replace")


def test_only_modules_are_taken():
    with pytest.raises(SettingsError, match="not a dict"):
        zoo.optimize({})


def test_an_error_on_the_way_takes_back_what_was_made(monkeypatch: pytest.MonkeyPatch):
    model, batch = built(mixed)

    def stop(measure: Measure, make: object) -> float:
        if type(model.attention) is not nn.MultiheadAttention:
            raise KeyboardInterrupt
        return 2.0

    monkeypatch.setattr(Measure, "gain", stop)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(KeyboardInterrupt):
        zoo.optimize(model, batch)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_and_is_plain_again_after_undo():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    expected = model(x)
    report = zoo.optimize(model, x, compile=True)
    assert kept(report) == ["torch.compile"], str(report)
    torch.testing.assert_close(model(x), expected)
    report.undo()
    assert model._compiled_call_impl is None
