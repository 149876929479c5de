"""Faster equals of torch's layers. Each is a subclass with another `forward` and no state of its own, so that a module
becomes one by a change of its class: parameters, keys, hooks and the module itself stay what they were."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SdpaAttention(nn.MultiheadAttention):
    """Attention without the copy of queries, keys and values that torch's makes between projection and SDPA.

    The attention weights are given where `need_weights=True` is said; torch's computes them wherever it is not denied.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool | None = None,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The arguments and shapes of nn.MultiheadAttention; without weights, its second result is None."""
        if need_weights or (is_causal and attn_mask is None) or not self._is_common(query):
            weights = need_weights is not False
            return super().forward(
                query, key, value, key_padding_mask, weights, attn_mask, average_attn_weights, is_causal
            )
        q, k, v = self._project(query, key, value)  # each (B, H, T, D / H)
        if is_causal and key_padding_mask is None:
            mask = None  # the flag says what the mask holds, and the fastest kernels take no mask
        else:
            is_causal, mask = False, self._added(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal)
        x = x.permute(0, 2, 1, 3) if self.batch_first else x.permute(2, 0, 1, 3)
        return self.out_proj(x.flatten(2)), None

    def _is_common(self, query: Tensor) -> bool:
        plain = self.in_proj_weight is not None and self.bias_k is None and not self.add_zero_attn
        return plain and query.dim() == 3 and not query.is_nested

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """One matrix product for each input that differs from the one before it."""
        inputs = [query, key, value]
        results: list[Tensor] = []
        while len(results) < 3:
            first = last = len(results)
            while last < 3 and inputs[last] is inputs[first]:
                last += 1
            rows = slice(first * self.embed_dim, last * self.embed_dim)
            bias = None if self.in_proj_bias is None else self.in_proj_bias[rows]
            x = F.linear(inputs[first], self.in_proj_weight[rows], bias).unflatten(
                -1, (-1, self.num_heads, self.head_dim)
            )
            results += x.permute(2, 0, 3, 1, 4) if self.batch_first else x.permute(2, 1, 3, 0, 4)
        return tuple(results)

    def _added(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one to add to the scores: (T, S), or broadcast to (B, H, T, S); None without masks."""
        masks = []
        if attn_mask is not None:
            masks.append(attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, q.shape[:2]))
        if key_padding_mask is not None:
            masks.append(key_padding_mask[:, None, None])
        masks = [
            torch.zeros_like(m, dtype=q.dtype).masked_fill_(m, float("-inf"))
            if m.dtype == torch.bool
            else m.to(q.dtype)
            for m in masks
        ]
        return sum(masks[1:], masks[0]) if masks else None


class SharedLinear(nn.Linear):
    """One of several linear layers that read the same input: the one called first computes all in one product.

    Each keeps its own parameters, which are joined anew in every call. A result waits for the call that it was made
    for, and is used only if input, parameters and grad mode are as they were.
    """

    group: tuple[SharedLinear, ...] = ()
    _waiting: tuple | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D')."""
        waiting, self._waiting = self._waiting, None
        moment = self._moment(x)
        if waiting is not None and waiting[0] is x and waiting[1] == moment:
            return waiting[2]
        if any(one.weight.shape != (one.out_features, one.in_features) for one in self.group):
            return super().forward(x)  # ZeRO-3 holds only this layer's weights whole during its call
        weight = torch.cat([one.weight for one in self.group])
        bias = None if self.bias is None else torch.cat([one.bias for one in self.group])
        results = F.linear(x, weight, bias).split([one.out_features for one in self.group], -1)
        for one, result in zip(self.group, results, strict=True):
            if one is self:
                mine = result
            else:
                one._waiting = (x, moment, result)
        return mine

    def _moment(self, x: Tensor) -> tuple:
        """What changes when the input or a parameter is written to, or gradients are switched on or off."""
        tensors = [x, *(p for one in self.group for p in one.parameters())]
        return torch.is_grad_enabled(), *(None if t.is_inference() else t._version for t in tensors)


class ChannelsLastConv2d(nn.Conv2d):
    """A convolution whose input, and so its output, lies in memory with the channels last."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H', W')."""
        return super().forward(x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x)
