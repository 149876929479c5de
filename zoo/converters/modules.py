"""What converters of published networks share: names of modules by table, and what the names of tensors count."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from zoo.errors import WeightsMismatch

State = dict[str, Tensor]


def renamed(state: Mapping[str, Tensor], modules: Mapping[str, str]) -> State:
    """The state with each name's longest beginning that is a module of the table replaced; other names stay."""
    return {rename(name, modules): tensor for name, tensor in state.items()}


def rename(name: str, modules: Mapping[str, str]) -> str:
    """The name with its longest beginning that is a module of the table replaced."""
    module, rest = name, ""
    while module:
        if module in modules:
            return modules[module] + rest
        module, _, last = module.rpartition(".")
        rest = f".{last}{rest}"
    return name


def turned(modules: Mapping[str, str]) -> dict[str, str]:
    """The table the other way round."""
    return {theirs: ours for ours, theirs in modules.items()}


def below(state: Mapping[str, Tensor], prefix: str) -> State:
    """What is named after the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def unwrapped(state: Mapping[str, Tensor], wrappers: tuple[str, ...]) -> State:
    """The state without each of these prefixes, in order, and without what is beside it, where there is one."""
    for wrapper in wrappers:
        state = below(state, wrapper) or state
    return dict(state)


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the largest number that the names hold at the pattern's group."""
    return max((int(found[1]) + 1 for name in state if (found := re.match(pattern, name))), default=0)


def refuse(config: Mapping, fixed: Mapping, network: str) -> None:
    """Raises WeightsMismatch where a published config asks for what our network does in one way only, and shapes do not
    show: `fixed`, name -> that way, None for nothing. What the config leaves out, or at null, is as published."""
    wanted = {name: value for name in fixed if (value := config.get(name)) or (value is not None and fixed[name])}
    others = [f"{name}={value!r}" for name, value in wanted.items() if value != fixed[name]]
    if others:
        raise WeightsMismatch(
            f"this {network} is of a kind that zoo does not have, by its config.json: {', '.join(others)}; here it is "
            f"{', '.join(f'{name}={fixed[name]!r}' for name in (other.split('=')[0] for other in others))}"
        )


def some(state: Mapping[str, Tensor]) -> str:
    """For a message: how many tensors, and the names of a few."""
    return f"{len(state)} tensors ({', '.join(sorted(state)[:3]) or 'none'}, ...)"
