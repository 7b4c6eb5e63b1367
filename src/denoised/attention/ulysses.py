"""The exchange of Ulysses: pieces of the sequence with all heads become longer pieces with some heads, and back.

Exact for any lengths and any number of heads: parts are as long as they are, nothing is padded.
Tensors are [batch, heads, tokens, channels].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from denoised.attention.layout import Heads
from denoised.steps import collectives
from denoised.steps.collectives import Group


def to_heads(
    tensors: Sequence[Tensor], slices: Sequence[Sequence[slice]], lengths: Sequence[Sequence[int]], group: Group
) -> list[Tensor]:
    """Each tensor's heads of this rank, for the tokens of the whole group; all tensors travel as one message.

    slices: per tensor and rank, the heads that the rank gets. lengths: per tensor and rank, the tokens that it has.
    """
    if group.size() == 1:
        return list(tensors)
    rank, ranks = group.rank(), range(group.size())
    sent = [[x[:, s[r]] for x, s in zip(tensors, slices, strict=True)] for r in ranks]
    shapes = [[_shape(x, s[rank], n[r]) for x, s, n in zip(tensors, slices, lengths, strict=True)] for r in ranks]
    columns = zip(*collectives.exchange(sent, shapes, group), strict=True)
    return [torch.cat(column, dim=2) for column in columns]


def to_sequence(x: Tensor, heads: Heads, lengths: Sequence[int], group: Group) -> Tensor:
    """All heads, for the tokens of this rank."""
    if group.size() == 1:
        return x
    mine = lengths[group.rank()]
    sent = [[part] for part in torch.split(x, list(lengths), dim=2)]
    shapes = [[_shape(x, heads.of(rank), mine)] for rank in range(group.size())]
    return torch.cat([part for (part,) in collectives.exchange(sent, shapes, group)], dim=1)


def _shape(x: Tensor, heads: slice, tokens: int) -> torch.Size:
    return torch.Size([x.shape[0], heads.stop - heads.start, tokens, x.shape[3]])
