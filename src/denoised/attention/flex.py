"""Torch's flex attention, compiled: a kernel that is generated for the device, with or without a bias on the scores.

One compilation serves all shapes. Without compiling, it would write out all scores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from denoised.attention.graphs import compiled, open_lengths


def flex(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """[batch, heads, tokens, channels]. bias: [b or 1, h or 1, q or 1, k], added to scores."""
    if causal:
        past = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        bias = torch.where(past, q.new_zeros(1, 1, 1, 1) if bias is None else bias, float("-inf"))
    q, k, v = (x.contiguous() for x in (q, k, v))
    with open_lengths(), torch.no_grad():
        if bias is None:
            return _kernel(_without)(q, k, v, scale)
        full = bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2]).contiguous()
        return _kernel(_with_bias)(q, k, v, full, scale)


@functools.cache
def _kernel(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return compiled(function)


def _without(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, scale=scale)


def _with_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float | None) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    def score(value: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return value + bias[batch, head, query, key]

    return flex_attention(q, k, v, score_mod=score, scale=scale)
