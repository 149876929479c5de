"""Drawing a sequence of tokens from a model that predicts the next one. B sequences, V vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from zoo.errors import SettingsError

Predict = Callable[[Tensor | None, int], Tensor]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen. Raises SettingsError.

    `temperature` divides the logits, 0 takes the likeliest. `top_k` keeps so many of the likeliest; `top_p` the
    likeliest that together have this probability (Holtzman et al. 2019). `guidance`: how far to go from what the model
    draws without a prompt to what it draws with one and beyond; 1 is the prompt alone (Ho and Salimans 2022).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise SettingsError(f"temperature={self.temperature!r}: give 0, for the likeliest, or more")
        if self.top_k is not None and self.top_k < 1:
            raise SettingsError(f"top_k={self.top_k!r}: give 1 or more, or None to keep all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise SettingsError(f"top_p={self.top_p!r}: give a probability above 0, up to 1, or None to keep all")


def uniforms(seeds: Sequence[int], length: int) -> Tensor:
    """A number in [0, 1) per sequence and token, (B, length): each row depends on its seed alone, on every device."""
    rows = [torch.rand(length, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def guide(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: u + scale (c - u)."""
    return torch.lerp(unconditional, conditional, scale)


def choose(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """Logits (B, V) and a number in [0, 1) for each row -> tokens (B,).

    The token is where the number falls among the cumulated probabilities, so a sequence's tokens depend on its own
    numbers only and nothing waits for the device.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    vocab = logits.shape[-1]
    top_k = min(sampling.top_k or vocab, vocab)
    order = None
    if sampling.top_p is not None:
        logits, order = logits.sort(-1, descending=True)
        logits, order = logits[:, :top_k], order[:, :top_k]
    elif top_k < vocab:
        logits, order = logits.topk(top_k)
    probabilities = logits.softmax(-1)
    if sampling.top_p is not None:
        before = probabilities.cumsum(-1) - probabilities  # of all that are likelier
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0)
    cumulated = probabilities.double().cumsum(-1)
    wanted = uniform.to(cumulated)[:, None] * cumulated[:, -1:]
    # The first whose cumulated probability is above the number: one of probability 0 never is.
    place = (cumulated <= wanted).sum(-1, keepdim=True).clamp_max(cumulated.shape[-1] - 1)
    return (place if order is None else order.gather(-1, place))[:, 0]


def sample_tokens(
    predict: Predict,
    uniforms: Tensor,
    sampling: Sampling,
    given: Tensor | None = None,
    on_token: Callable[[int, Tensor], None] | None = None,
    progress: bool = False,
) -> Tensor:
    """Draws as many tokens as `uniforms` (B, length) has columns -> (B, length).

    `predict(tokens, position)` -> logits (B, V) of the token at `position`; tokens (B,) is the one before it, None at
    position 0, and each position is asked for once, in order. `given` (B, G): the first tokens are these. `on_token(
    position, tokens so far (B, position + 1))` is told after each. `progress`: a bar, if it takes over two seconds.
    """
    batch, length = uniforms.shape
    tokens = torch.empty(batch, length, dtype=torch.int64, device=uniforms.device)
    first = 0 if given is None else given.shape[1]
    if first > length:
        raise SettingsError(f"{first} tokens are given, and there are {length} in all")
    last = None
    for position in tqdm(range(length), "tokens", disable=not progress, delay=2, leave=False):
        logits = predict(last, position)
        if position < first:
            last = given[:, position].to(tokens)
        else:
            last = choose(logits, uniforms[:, position], sampling).to(tokens)
        tokens[:, position] = last
        if on_token is not None:
            on_token(position, tokens[:, : position + 1])
    return tokens
