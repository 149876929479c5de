"""Weights -> a model: strict, by assignment, so that a model built blank or on `meta` costs its weights once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zoo.devices import find_device
from zoo.errors import WeightsMismatch

_NAMED = 8  # how many names an error lists


def load(
    model: nn.Module,
    state: dict[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Puts `state` into `model`, built within `blank` or on `meta` or anyhow, and returns the model on `device`.

    Floating tensors become `dtype`; None leaves each as it is in `state`, and integers always stay. A tensor that fits
    already is not copied: model and state then share it. Parameters keep their `requires_grad`; tied ones stay tied,
    and one of their names in `state` is enough.
    Raises WeightsMismatch where names or shapes differ, DeviceNotFound where the machine lacks the device.
    """
    device = find_device(device)
    ties = _ties(model)
    state = _fill_ties(state, ties)
    _check(model, state)
    parts = dict(model.named_modules(remove_duplicate=False))  # a module may have several names
    for name, tensor in state.items():
        _place(parts, name, _fit(tensor, device, dtype))
    for first, *others in ties:
        for name in others:
            _place(parts, name, model.get_parameter(first))
    _refuse_meta(model)
    for name, buffer in list(
        model.named_buffers(remove_duplicate=False)
    ):  # what no file holds: those outside the state
        _place(parts, name, buffer.to(device))
    return model


def _fit(tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().to(device, dtype if tensor.is_floating_point() else None)


# --- tied parameters -------------------------------------------------------------------------------------------------
def _ties(model: nn.Module) -> list[list[str]]:
    """The names of each parameter that has more than one."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _fill_ties(state: dict[str, Tensor], ties: list[list[str]]) -> dict[str, Tensor]:
    """`state` with every name of a tied parameter, where it has one of them."""
    state = dict(state)
    for group in ties:
        given = [name for name in group if name in state]
        for name in given[1:]:
            one, other = state[given[0]], state[name]
            if _kind(one) != _kind(other) or not torch.equal(one, other):
                raise WeightsMismatch(
                    f"the model ties {given[0]!r} and {name!r}, and these weights differ between them"
                )
        state |= {name: state[given[0]] for name in group if given}
    return state


def _place(parts: dict[str, nn.Module], name: str, tensor: Tensor) -> None:
    """Puts it where the parameter or buffer of that name was, as `load_state_dict(assign=True)` does, in a third of the
    time."""
    owner, _, last = name.rpartition(".")
    before = parts[owner]._parameters.get(last)
    if before is None:
        setattr(parts[owner], last, tensor)
        return
    if not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=before.requires_grad)
    parts[owner].register_parameter(last, tensor)  # which tells those who build in pieces


# --- strictness ------------------------------------------------------------------------------------------------------
def _check(model: nn.Module, state: dict[str, Tensor]) -> None:
    wanted = model.state_dict(keep_vars=True)
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    reshaped = [
        f"{name} is {_kind(state[name])} and should be {_kind(wanted[name])}"
        for name in wanted
        if name in state and not _alike(state[name], wanted[name])
    ]
    problems = [
        _listed(f"{len(missing)} of {len(wanted)} tensors are missing", missing),
        _listed(f"{len(unexpected)} are left over", unexpected),
        _listed(f"{len(reshaped)} have another shape", reshaped),
    ]
    found = "; ".join(filter(None, problems))
    name = type(model).__name__
    if wanted and len(missing) == len(wanted):
        raise WeightsMismatch(f"these are the weights of another model, with not one name of {name}: {found}")
    if found:
        raise WeightsMismatch(f"these weights do not fit {name}: {found}")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _alike(given: Tensor, wanted: Tensor) -> bool:
    return given.shape == wanted.shape and given.is_floating_point() == wanted.is_floating_point()


def _listed(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{what}: {', '.join(names[:_NAMED])}{more}"


def _refuse_meta(model: nn.Module) -> None:
    held = [*model.named_parameters(), *model.named_buffers()]
    empty = [name for name, tensor in held if tensor.is_meta]
    if empty:
        raise WeightsMismatch(
            f"{type(model).__name__} keeps {', '.join(empty[:_NAMED])} outside its state (persistent=False), "
            "so that no weights can fill it; build the model off meta, or make the buffer part of the state"
        )
