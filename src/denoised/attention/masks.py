"""Masks of an attention whose sequence is spread over ranks.

A model makes its masks for all keys or for its rank's keys, and in its own order of streams; after the exchange keys
lie in order of rank. Lengths tell which of the two a mask is, alike on all ranks: none holds a whole sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from denoised.attention.layout import Layout
from denoised.steps import collectives
from denoised.steps.collectives import Group


def spread_mask(
    mask: Tensor | None,
    *,
    causal: bool,
    queries: Layout,
    keys: Layout,
    ring: Group,
    ulysses: Group,
    device: torch.device,
) -> Tensor | None:
    """What the queries of this rank's Ulysses group may see: [b or 1, h or 1, q or 1, all keys in order of rank]."""
    if mask is not None:
        mask = _four(mask)
        mask = _all_keys(mask, keys, ring, ulysses)
        mask = _group_queries(mask, queries, ring.rank())
    if not causal:
        return mask
    past = _causal(queries, keys, ring.rank(), device)
    return past if mask is None else _both(mask, past)


def _four(mask: Tensor) -> Tensor:
    while mask.dim() < 4:
        mask = mask.unsqueeze(0)
    return mask


def _all_keys(mask: Tensor, keys: Layout, ring: Group, ulysses: Group) -> Tensor:
    num, local = mask.shape[-1], keys.lengths[ring.rank() * ulysses.size() + ulysses.rank()]
    if num == keys.total:
        return mask if keys.in_order else mask[..., _index(keys, mask)]
    assert num == local, f"a mask for {num} keys, where the sequence has {keys.total} and this rank {local}"
    row = _gathered(mask, keys.row(ring.rank()), ulysses)
    return _gathered(row, keys.rows, ring)


def _group_queries(mask: Tensor, queries: Layout, ring_rank: int) -> Tensor:
    """Of a mask for all queries, those of the group. A piece of them cannot be told from a mask for any query."""
    if mask.shape[-2] == 1:
        return mask
    assert mask.shape[-2] == queries.total, f"a mask for {mask.shape[-2]} of {queries.total} queries"
    first = sum(queries.rows[:ring_rank])
    return mask[:, :, _index(queries, mask)[first : first + queries.rows[ring_rank]]]


def _gathered(mask: Tensor, sizes: tuple[int, ...], group: Group) -> Tensor:
    data = mask.to(torch.uint8) if mask.dtype == torch.bool else mask  # gloo gathers no booleans
    return collectives.all_gather(data, group, dim=3, sizes=sizes).to(mask.dtype)


def _index(layout: Layout, like: Tensor) -> Tensor:
    return torch.tensor(layout.positions, device=like.device)


def _causal(queries: Layout, keys: Layout, ring_rank: int, device: torch.device) -> Tensor:
    """Each query sees the keys up to its own place in the plain sequence."""
    first = sum(queries.rows[:ring_rank])
    mine = queries.positions[first : first + queries.rows[ring_rank]]
    places = torch.tensor(mine, device=device), torch.tensor(keys.positions, device=device)
    return (places[0].unsqueeze(1) >= places[1].unsqueeze(0))[None, None]


def _both(mask: Tensor, past: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask & past
    return mask.masked_fill(~past, float("-inf"))
