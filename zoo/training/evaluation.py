"""A model's numbers over a data set: the mean loss, and the client's metrics over all logits and labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zoo import distributed
from zoo.errors import EmptyDataset, SettingsError

from . import rng
from .batches import length
from .engines import Engine

Metrics = Sequence[Sequence[Any]]  # [name, fn(logits, labels, meta=..., tokenizer=...)], the keywords if fn takes them
NOT_FOR_THE_MODEL = ("uid", "meta", "mode")  # what FlagAI's batches hold besides the model's inputs
_LABELS = ("labels", "target_ids")


@contextmanager
def judging(model: nn.Module, device: torch.device, seed: int) -> Iterator[None]:
    """Inside: evaluation mode, no gradients, the same chance every time. After: all is as it was before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), rng.kept(device):
            rng.seed_all(seed, distributed.rank())
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def loss_of(output: Any) -> Tensor:
    """The loss in a forward's output. Raises SettingsError saying what came instead."""
    if not isinstance(output, Mapping) or "loss" not in output:
        what = f"a dict of {', '.join(output)}" if isinstance(output, Mapping) else f"a {type(output).__name__}"
        raise SettingsError(f"the model's forward, or forward_step, must return a dict with 'loss'; it returned {what}")
    loss = output["loss"]
    if not isinstance(loss, Tensor) or loss.dim():
        what = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise SettingsError(f"output['loss'] must be a tensor of one number, it is {what}: take its mean")
    return loss


def evaluate_batches(
    engine: Engine, batches: Iterable[Any], metrics: Metrics = (), tokenizer: Any = None
) -> dict[str, float]:
    """{"loss": the mean over samples, name: of each metric}. Inside `judging`. Raises SettingsError, EmptyDataset."""
    total, count = torch.zeros((), device=engine.device), 0
    logits, labels, meta = [], [], []
    for batch in batches:
        output, size = engine.evaluate(batch), length(batch)
        total += loss_of(output).float() * size
        count += size
        if metrics:
            if "logits" not in output:
                raise SettingsError(
                    f"metric_methods need 'logits' in the forward's output, which has {', '.join(output)}"
                )
            logits.append(distributed.gather(output["logits"].detach().float()).cpu())
            named = batch if isinstance(batch, Mapping) else {}
            meta.extend(named.get("meta") or ())
            labels += [distributed.gather(batch[k].to(engine.device)).cpu() for k in _LABELS[::-1] if k in batch][-1:]
    if not count:
        raise EmptyDataset("the validation data gave no batch")
    sums = distributed.gather(torch.stack([total, torch.full_like(total, count)])[None]).sum(0).tolist()
    numbers = {"loss": sums[0] / sums[1]}
    for name, metric in metrics:
        numbers[name] = _measure(
            name, metric, torch.cat(logits), torch.cat(labels) if labels else None, meta, tokenizer
        )
    return numbers


def _measure(
    name: str, metric: Callable[..., Any], logits: Tensor, labels: Tensor | None, meta: list[Any], tokenizer: Any
) -> float:
    taken = inspect.signature(metric).parameters
    anything = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    if "meta" in taken and distributed.is_distributed():
        raise SettingsError(
            f"metric {name!r} asks for meta, which stays on each process: measure with evaluate=fn(model)"
        )
    words = {"meta": meta or None, "tokenizer": tokenizer}
    words = {key: value for key, value in words.items() if anything or key in taken}
    try:
        return float(metric(logits, labels, **words))
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        if labels is not None:
            raise
        raise SettingsError(
            f"metric {name!r} failed ({error}); it was given labels=None, for no batch holds {' or '.join(_LABELS)}: "
            "add them to collate_fn, or measure with evaluate=fn(model)"
        ) from error
