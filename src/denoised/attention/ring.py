"""Ring attention: blocks of keys and values go round, the next one under way while this one is computed.

Tensors are [batch, heads, tokens, channels]. Blocks are padded on the way to the length of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from denoised.attention.kernels import Part, attend, merge
from denoised.steps.collectives import Group, Shift


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Sequence[int],
    mask: Tensor | None,
    scale: float | None,
    group: Group,
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks.

    lengths: keys of each rank. mask: for this rank's queries and all keys in order of rank.
    """
    if not query.shape[1]:  # fewer heads than ranks: a whole column of the mesh has none
        return value.new_zeros((*query.shape[:-1], value.shape[-1]))
    # In one piece, as they travel: kernels of CPUs are faster on them, too.
    blocks = [_padded(x, max(lengths)).contiguous() for x in (key, value)]
    size, rank, result = group.size(), group.rank(), None
    for step in range(size):
        shift = Shift(blocks, group) if step < size - 1 else None
        part = _block(query, blocks, (rank - step) % size, lengths, mask, scale)
        result = part if result is None else merge(result, part)
        blocks = shift.wait() if shift is not None else blocks
    assert result is not None
    return result.out.to(query.dtype)


def _block(
    query: Tensor,
    blocks: Sequence[Tensor],
    owner: int,
    lengths: Sequence[int],
    mask: Tensor | None,
    scale: float | None,
) -> Part:
    first, size = sum(lengths[:owner]), lengths[owner]
    key, value = (block[:, :, :size] for block in blocks)
    seen = None if mask is None else mask[..., first : first + size]
    return attend(query, key, value, mask=seen, scale=scale)


def _padded(x: Tensor, tokens: int) -> Tensor:
    missing = tokens - x.shape[2]
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x
