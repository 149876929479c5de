"""Drawing image tokens one by one: what was computed once is kept, and a layer reads only what its pattern sees.

P prompts (the unconditional ones behind them, if there is guidance), C candidates of each, R = P * C rows, H heads,
d width of a head, T text tokens, N image tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.blocks.grid_attention import visible
from zoo.generation.tokens import guide
from zoo.models.dalle_transformer import DalleTransformer


class Decoding:
    """What `zoo.generation.tokens.sample_tokens` asks for the next token's logits, for C candidates of each prompt.

    `text` (P, T): each prompt is read once, and its keys and values are shared by its candidates. `without` (1, T) or
    (P, T): the text that stands for no prompt; with it, logits are guided by `scale`, and its rows have a cache of
    their own. Rows are in the order of prompts, a prompt's candidates together.
    """

    def __init__(
        self,
        model: DalleTransformer,
        text: Tensor,
        candidates: int = 1,
        without: Tensor | None = None,
        scale: float = 1.0,
    ):
        self.model, self.candidates = model, candidates
        self.scale = scale if without is not None else None
        if without is not None:
            text = torch.cat([text, without.expand_as(text)])
        config, weight = model.config, model.image_head.weight
        self.prompts, self.rows = len(text), len(text) * candidates
        self.patterns = config.patterns
        self.texts: list[tuple[Tensor, Tensor]] = []  # of each layer: keys (P, H, d, T) and values (P, H, T, d)
        self.logits = self._read(text)
        shape = (config.depth, 2, self.rows, config.heads, config.grid**2, config.width // config.heads)
        self.images = torch.empty(shape, dtype=weight.dtype, device=self.logits.device)

    def __call__(self, tokens: Tensor | None, position: int) -> Tensor:
        """Logits (P * C, V) of the image token at `position`, after `tokens` (P * C,) at the one before it."""
        logits = (
            self.logits.repeat_interleave(self.candidates, 0) if tokens is None else self._step(tokens, position - 1)
        )
        if self.scale is None:
            return logits
        return guide(*logits.chunk(2), self.scale)

    def _read(self, text: Tensor) -> Tensor:
        """Text tokens (P, T) -> logits (P, V) of the first image token; keys and values are kept."""
        model = self.model

        def gather(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.texts.append((k.transpose(-1, -2).contiguous(), v.contiguous()))
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        x = model.embed_text(text)
        for block in model.blocks:
            x = block(x, gather)
        return model.image_head(model.head_norm(model.norm(x[:, -1])))

    def _step(self, tokens: Tensor, place: int) -> Tensor:
        """Tokens at `place` -> logits (R, V) of the next one."""
        model = self.model
        if self.scale is not None:
            tokens = tokens.repeat(2)
        x = model.embed_image(tokens[:, None], torch.tensor([place], device=tokens.device))  # (R, 1, D)
        for layer, block in enumerate(model.blocks):
            x = block(x, lambda q, k, v, layer=layer: self._gather(layer, place, q, k, v))
        return model.image_head(model.head_norm(model.norm(x[:, 0])))

    def _gather(self, layer: int, place: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Queries, keys and values (R, H, 1, d) of the image token at `place` -> what it gathers (R, H, 1, d)."""
        cache = self.images[layer]
        cache[0, :, :, place] = k[:, :, 0]
        cache[1, :, :, place] = v[:, :, 0]
        keys, values = self._seen(layer, place)  # (R, H, S, d)
        text_keys, text_values = self.texts[layer]
        q = q * q.shape[-1] ** -0.5
        by_prompt = q.view(self.prompts, self.candidates, *q.shape[1:2], q.shape[-1]).transpose(1, 2)  # (P, H, C, d)
        of_text = by_prompt @ text_keys  # (P, H, C, T)
        of_image = (q @ keys.transpose(-1, -2)).view(self.prompts, self.candidates, q.shape[1], -1).transpose(1, 2)
        weights = torch.cat([of_text, of_image], -1).softmax(-1, dtype=torch.float32).to(q.dtype)
        from_text = weights[..., : of_text.shape[-1]] @ text_values  # (P, H, C, d)
        image_weights = weights[..., of_text.shape[-1] :].transpose(1, 2).reshape(*q.shape[:2], 1, -1)
        return (image_weights @ values) + from_text.transpose(1, 2).reshape(q.shape)

    def _seen(self, layer: int, place: int) -> Tensor:
        """Keys and values (2, R, H, S, d) that the token at `place` looks at: as many as its pattern allows."""
        cache, config, pattern = self.images[layer], self.model.config, self.patterns[layer]
        if pattern == "full":
            return cache[:, :, :, : place + 1]
        if pattern == "row":
            return cache[:, :, :, max(0, place - config.grid) : place + 1]
        if pattern == "column":
            return cache[:, :, :, place % config.grid : place + 1 : config.grid]
        places, hidden = visible(pattern, config.grid, config.kernel)
        seen = places[place][hidden[place] == 0].to(cache.device)
        return cache.index_select(3, seen)
