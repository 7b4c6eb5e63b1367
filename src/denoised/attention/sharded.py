"""The attention function of every model: Ulysses inside a ring, either of which may be of one rank.

Each rank gives its tokens' queries, keys and values with all heads, and gets its tokens' answers with all heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from denoised.attention.layout import Heads, Layout
from denoised.attention.masks import spread_mask
from denoised.attention.ring import ring_attention
from denoised.attention.ulysses import to_heads, to_sequence
from denoised.steps import collectives
from denoised.steps.collectives import Group
from denoised.steps.tally import count


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The two groups that a sequence is spread over; rank = ring rank x ulysses size + ulysses rank."""

    ring: Group
    ulysses: Group

    @property
    def size(self) -> int:
        return self.ring.size() * self.ulysses.size()

    @property
    def rank(self) -> int:
        return self.ring.rank() * self.ulysses.size() + self.ulysses.rank()

    def layout(self, *streams: int) -> Layout:
        return Layout(streams=streams, ring=self.ring.size(), ulysses=self.ulysses.size())

    def asked(self, num: int, device: torch.device) -> Layout:
        """The layout of tokens of which every rank only knows its own number: they tell each other."""
        row = collectives.all_gather(torch.tensor([num], device=device), self.ulysses, dim=0)
        lengths = tuple(collectives.all_gather(row, self.ring, dim=0, sizes=[len(row)] * self.ring.size()).tolist())
        return Layout(streams=(sum(lengths),), ring=self.ring.size(), ulysses=self.ulysses.size(), known=lengths)


def sequence_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    axes: Axes,
    queries: Layout,
    keys: Layout,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Exact attention over all ranks' keys. [batch, heads, this rank's tokens, channels] in and out.

    Key heads may be fewer than query heads if they divide them. `mask` may be for all keys or for this rank's,
    and for all queries or for any.
    """
    count("sequence_attention")
    ring, ulysses = axes.ring, axes.ulysses
    heads = Heads(queries=query.shape[1], keys=key.shape[1], size=ulysses.size())
    row, key_row = queries.row(ring.rank()), keys.row(ring.rank())
    # A single stream stays in the plain order, so that the kernel's own causal form can be used.
    plain_causal = causal and mask is None and ring.size() == 1 and queries.in_order and keys.in_order
    mask = spread_mask(
        mask,
        causal=causal and not plain_causal,
        queries=queries,
        keys=keys,
        ring=ring,
        ulysses=ulysses,
        device=query.device,
    )
    query, key, value = _exchanged((query, key, value), heads, row, key_row, ulysses)
    mask = _of_heads(mask, heads, ulysses.rank())
    if ring.size() > 1:
        out = ring_attention(query, key, value, lengths=keys.rows, mask=mask, scale=scale, group=ring)
    else:
        out = _local(query, key, value, mask, plain_causal, scale)
    return to_sequence(out, heads, row, ulysses)


def _exchanged(
    tensors: tuple[Tensor, Tensor, Tensor], heads: Heads, row: tuple[int, ...], key_row: tuple[int, ...], group: Group
) -> list[Tensor]:
    ranks = range(group.size())
    mine, theirs = [heads.of(rank) for rank in ranks], [heads.keys_of(rank) for rank in ranks]
    query, key, value = to_heads(tensors, (mine, theirs, theirs), (row, key_row, key_row), group)
    if heads.group == 1:
        return [query, key, value]
    index = torch.tensor(heads.key_of_each(group.rank()), device=key.device, dtype=torch.long)
    return [query, key.index_select(1, index), value.index_select(1, index)]


def _of_heads(mask: Tensor | None, heads: Heads, rank: int) -> Tensor | None:
    return mask if mask is None or mask.shape[1] == 1 else mask[:, heads.of(rank)]


def _local(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Tensor:
    """All keys are here: whichever kernel torch finds best."""
    if not query.numel():
        return value.new_zeros((*query.shape[:-1], value.shape[-1]))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale
    )
