"""Loading is strict, costs the weights once, and leaves the model as its builder meant it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from zoo.errors import DeviceNotFound, WeightsMismatch
from zoo.weights import load, read, write


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.first.bias.requires_grad_(False)

    def forward(self, x):
        return self.norm(self.first(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 5, bias=False)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


class Unsaved(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("positions", torch.arange(3), persistent=False)


def on_meta(build, *args):
    with torch.device("meta"):
        return build(*args)


def test_a_model_on_meta_becomes_the_model_that_was_saved(tmp_path):
    original = Net().eval()
    write(original.state_dict(), tmp_path / "x.safetensors")
    model = load(on_meta(Net), read(tmp_path / "x.safetensors")).eval()
    x = torch.randn(3, 4)
    assert torch.equal(model(x), original(x))
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_what_fits_is_not_copied(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(Net().state_dict(), path)
    state = read(path)
    model = load(on_meta(Net), state, dtype=torch.float32)
    assert {n: t.data_ptr() for n, t in model.state_dict().items()} == {n: t.data_ptr() for n, t in state.items()}


def test_parameters_stay_parameters_and_keep_their_requires_grad():
    model = load(on_meta(Net), Net().state_dict())
    assert isinstance(model.first.weight, nn.Parameter) and model.first.weight.requires_grad
    assert isinstance(model.first.bias, nn.Parameter) and not model.first.bias.requires_grad
    assert model.first.weight.is_leaf
    model(torch.randn(3, 4)).sum().backward()
    assert model.first.weight.grad is not None


def test_a_state_that_requires_grad_is_not_a_chain_to_another_model():
    other = Net()
    model = load(on_meta(Net), dict(other.state_dict(keep_vars=True)))
    model(torch.randn(3, 4)).sum().backward()
    assert other.first.weight.grad is None and model.first.weight.grad is not None


def test_floating_tensors_are_cast_and_integers_are_not():
    model = load(on_meta(Net), Net().state_dict(), dtype=torch.bfloat16)
    assert model.first.weight.dtype == model.norm.running_mean.dtype == torch.bfloat16
    assert model.norm.num_batches_tracked.dtype == torch.int64


def test_without_a_dtype_each_tensor_stays_as_it_is():
    state = Net().state_dict()
    state["first.weight"] = state["first.weight"].half()
    model = load(on_meta(Net), state)
    assert model.first.weight.dtype == torch.float16 and model.first.bias.dtype == torch.float32


def test_the_state_is_left_as_it_was():
    state = Tied().state_dict()
    state.pop("head.weight")
    before = dict(state)
    load(on_meta(Tied), state, dtype=torch.float16)
    assert state == before


# --- strictness ------------------------------------------------------------------------------------------------------
def test_missing_and_left_over_names_are_listed_and_nothing_is_loaded():
    state = Net().state_dict()
    state["second.weight"] = state.pop("first.weight")
    model = on_meta(Net)
    with pytest.raises(WeightsMismatch, match=r"Net: 1 of 7 .* missing: first.weight; 1 .* left over: second.weight"):
        load(model, state)
    assert model.first.bias.is_meta


def test_shapes_are_listed():
    with pytest.raises(WeightsMismatch, match=r"6 have another shape: first.weight is float32 \(4, 4\) .* \(5, 5\)"):
        load(on_meta(Net, 5), Net().state_dict())


def test_integers_do_not_pass_for_floats_nor_the_other_way_round():
    for name in ("first.weight", "norm.num_batches_tracked"):
        state = Net().state_dict()
        state[name] = state[name].to(torch.int8 if state[name].is_floating_point() else torch.float32)
        with pytest.raises(WeightsMismatch, match=name):
            load(on_meta(Net), state)


def test_at_most_eight_names_are_listed():
    state = Net().state_dict() | {f"extra{i}": torch.ones(1) for i in range(30)}
    with pytest.raises(WeightsMismatch, match="30 are left over: extra0, .*extra7 and 22 more$"):
        load(on_meta(Net), state)


def test_weights_of_another_model_are_called_so():
    with pytest.raises(WeightsMismatch, match="another model, with not one name of Tied"):
        load(on_meta(Tied), Net().state_dict())


# --- ties ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("left_out", [None, "head.weight", "embed.weight"])
def test_tied_parameters_stay_one(tmp_path, left_out, dtype):
    original = Tied()
    state = original.state_dict()
    write({name: tensor for name, tensor in state.items() if name != left_out}, tmp_path / "x.safetensors")
    model = load(on_meta(Tied), read(tmp_path / "x.safetensors"), dtype=dtype)
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, original.head.weight.to(dtype or torch.float32))
    assert len(list(model.parameters())) == 1


def test_a_module_of_two_names_stays_one():
    def model() -> nn.Module:
        shared = nn.BatchNorm1d(3)
        return nn.Sequential(shared, nn.Linear(3, 3), shared)

    state = {name: torch.rand_like(t) if t.is_floating_point() else t + 5 for name, t in model().state_dict().items()}
    state |= {name.replace("0.", "2.", 1): state[name] for name in state if name.startswith("0.")}
    loaded = load(model(), state)
    assert loaded[0] is loaded[2] and len(list(loaded.parameters())) == 4
    assert all(torch.equal(t, state[name]) for name, t in loaded.state_dict().items())


def test_two_values_for_a_tied_parameter_are_an_error():
    state = {name: tensor.clone() for name, tensor in Tied().state_dict().items()}
    state["head.weight"][0, 0] += 1
    with pytest.raises(WeightsMismatch, match="ties 'embed.weight' and 'head.weight'"):
        load(on_meta(Tied), state)


# --- what a file cannot give -----------------------------------------------------------------------------------------
def test_a_buffer_that_no_file_holds_must_not_stay_on_meta():
    with pytest.raises(WeightsMismatch, match="positions .*persistent=False"):
        load(on_meta(Unsaved), {"weight": torch.ones(2)})
    assert load(Unsaved(), {"weight": torch.zeros(2)}).positions.tolist() == [0, 1, 2]


@pytest.mark.parametrize("device", ["cuda:7", "nowhere", "xpu:3"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(device):
    with pytest.raises(DeviceNotFound, match=f"{device}.* has: cpu"):
        load(on_meta(Net), Net().state_dict(), device=device)
