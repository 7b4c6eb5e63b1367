"""How much tensors changed since an earlier step, agreed by all ranks that share the forward.

Ranks that hold parts of a sequence sum up what their parts say, and ranks that hold equal tensors sum up equal
numbers, so that the quotient is the same; and all ranks get the very same sums, so that they decide alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from denoised.features.cache.fitting import fitted
from denoised.steps import collectives

Group = collectives.Group
Pair = tuple[list[Tensor], list[Tensor]]


def changes(pairs: Sequence[Pair], group: Group | None) -> list[float]:
    """For each pair (old, new): mean |new - old| / mean |old| over all of their tensors; infinite if old is 0."""
    return quotients(summed(pairs, group))


def summed(pairs: Sequence[Pair], group: Group | None) -> Tensor:
    """For each pair the two sums of that, [pairs, 2]."""
    sums = torch.stack([torch.stack(_sums(old, new)) for old, new in pairs])
    return sums if group is None else collectives.all_reduce(sums, group)


def quotients(sums: Tensor) -> list[float]:
    return [_quotient(difference, size) for difference, size in sums.tolist()]


def magnitude(old: list[Tensor], new: list[Tensor], group: Group | None) -> float:
    """Mean |new| / mean |old|."""
    sums = torch.stack([_size(new), _size(old)])
    after, before = (sums if group is None else collectives.all_reduce(sums, group)).tolist()
    return _quotient(after, before)


def _sums(old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
    # Of a padded text only as much as both have.
    pairs = [(_cut(a, b), _cut(b, a)) for a, b in zip(old, new, strict=True)]
    return [_size([b.float() - a.float() for a, b in pairs]), _size([a for a, _ in pairs])]


def _cut(tensor: Tensor, other: Tensor) -> Tensor:
    shape = [min(a, b) for a, b in zip(tensor.shape, other.shape, strict=True)]
    return fitted(tensor, shape)


def _size(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.float().abs().sum() for tensor in tensors]).sum()


def _quotient(a: float, b: float) -> float:
    return a / b if b else (0.0 if not a else float("inf"))
