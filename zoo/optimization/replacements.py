"""What `optimize` can replace, as a table: where each is found, and how it is made and taken back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from zoo.optimization.layers import ChannelsLastConv2d, SdpaAttention, SharedLinear

Undo = Callable[[], None]
Run = Callable[[], object]  # the model on the example batch


@dataclass(frozen=True)
class Found:
    """Where a replacement fits, as module paths, and `make()`, which makes it and returns what takes it back."""

    where: tuple[str, ...]
    make: Callable[[], Undo]


@dataclass(frozen=True)
class Replacement:
    """A row of the table. `sure`: equal by construction and made without measuring. `option`: its switch, if any."""

    name: str
    find: Callable[[nn.Module, Run | None], Found | None]
    sure: bool = False
    option: str | None = None


# --- how a replacement is made ---------------------------------------------------------------------------------------
def new_class(modules: dict[str, nn.Module], to: type[nn.Module]) -> Found | None:
    """The modules with the methods of `to`, a subclass of theirs."""

    def make() -> Undo:
        before = [(module, type(module)) for module in modules.values()]
        for module, _ in before:
            module.__class__ = to

        def undo() -> None:
            for module, cls in before:
                module.__class__ = cls

        return undo

    return Found(tuple(modules), make) if modules else None


def exactly(model: nn.Module, cls: type[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Modules of this very class: a subclass may mean something else by its forward."""
    return ((path, module) for path, module in model.named_modules() if type(module) is cls)


# --- where a replacement fits ----------------------------------------------------------------------------------------
def eager_transformers(model: nn.Module, run: Run | None) -> Found | None:
    """Models of the transformers package that compute softmax(QK)V by hand though their class knows SDPA."""
    models: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if not hasattr(module, "set_attn_implementation") or not getattr(module, "_supports_sdpa", False):
            continue
        config = module.config  # one that several models share is switched once
        # Both need the scores themselves, which SDPA does not give.
        scores = config.output_attentions or getattr(config, "attn_logit_softcapping", None)
        if config._attn_implementation == "eager" and not scores:
            if all(config is not other.config for other in models.values()):
                models[path or "(the model)"] = module

    def switch(to: str) -> None:
        for module in models.values():
            module.set_attn_implementation({"": to})  # its own, not that of the models inside it

    def make() -> Undo:
        switch("sdpa")
        return lambda: switch("eager")

    return Found(tuple(models), make) if models else None


def layer_attention(model: nn.Module, run: Run | None) -> Found | None:
    """The attention of torch's transformer layers, which never ask for the weights."""
    return new_class(_attention(model, in_layers=True), SdpaAttention)


def other_attention(model: nn.Module, run: Run | None) -> Found | None:
    """Attention called by code that may or may not use the weights: whether it does, the outputs tell."""
    return new_class(_attention(model, in_layers=False), SdpaAttention)


def _attention(model: nn.Module, in_layers: bool) -> dict[str, nn.Module]:
    layers = [
        layer for cls in (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer) for _, layer in exactly(model, cls)
    ]
    inside = {id(child) for layer in layers for child in layer.children()}
    return {path: m for path, m in exactly(model, nn.MultiheadAttention) if (id(m) in inside) == in_layers}


def shared_inputs(model: nn.Module, run: Run | None) -> Found | None:
    """Linear layers beside each other that are each called once, with the same tensor: q, k, v, or gate and up."""
    if run is None:
        return None
    groups = _called_together(model, run)

    def make() -> Undo:
        members = [module for group in groups.values() for module in group]
        for group in groups.values():
            for module in group:
                module.__class__, module.group = SharedLinear, tuple(group)

        def undo() -> None:
            for module in members:
                module.__class__ = nn.Linear
                for name in ("group", "_waiting"):
                    module.__dict__.pop(name, None)

        return undo

    return Found(tuple(groups), make) if groups else None


def _called_together(model: nn.Module, run: Run) -> dict[str, list[nn.Linear]]:
    """One run -> "path.{q,k,v}" -> the layers, for all that can share a product."""
    calls: dict[str, list[tuple[str, nn.Linear, torch.Tensor]]] = defaultdict(list)
    hooks = []
    for path, layer in exactly(model, nn.Linear):
        if layer._forward_pre_hooks or layer._forward_hooks:
            continue  # a hook may change the weights, or the input, of its own layer
        parent, _, name = path.rpartition(".")
        note = lambda layer, args, parent=parent, name=name: calls[parent].append((name, layer, *args))  # noqa: E731
        hooks.append(layer.register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    groups = {}
    for parent, called in calls.items():
        times = [layer for _, layer, *_ in called]
        alike = defaultdict(list)
        for name, layer, *args in called:
            if times.count(layer) == 1 and len(args) == 1:
                kind = (id(args[0]), layer.bias is None, layer.weight.dtype, layer.weight.device)
                alike[kind].append((name, layer))
        for members in alike.values():
            if len(members) > 1:
                names = ",".join(name for name, _ in members)
                groups[f"{parent}.{{{names}}}".lstrip(".")] = [layer for _, layer in members]
    return groups


def convolutions(model: nn.Module, run: Run | None) -> Found | None:
    """The convolutions, where there are several: a lone one cuts a picture into patches, and has nothing to pass on."""
    found = dict(exactly(model, nn.Conv2d))
    return new_class(found, ChannelsLastConv2d) if len(found) > 1 else None


def whole_model(model: nn.Module, run: Run | None) -> Found | None:
    """The model under torch.compile, which compiles when it is first called. It needs a C++ compiler."""
    before = model._compiled_call_impl
    if before is not None:
        return None
    model.compile()
    compiled, model._compiled_call_impl = model._compiled_call_impl, None

    def make() -> Undo:
        model._compiled_call_impl = compiled
        return lambda: setattr(model, "_compiled_call_impl", None)

    return Found(("(the model)",), make)


REPLACEMENTS = (
    Replacement("SDPA for eager attention of transformers", eager_transformers, sure=True),
    Replacement("SDPA in torch's transformer layers", layer_attention, sure=True),
    Replacement("SDPA for attention weights nobody uses", other_attention),
    Replacement("one product for layers of one input", shared_inputs),
    Replacement("channels_last convolutions", convolutions, option="channels_last"),
    Replacement("torch.compile", whole_model, option="compile"),
)
