"""Collectives inside a forward, each counted by name (`tally`). Functional: arguments are never written to.

Inference only: nothing here has a gradient. A group of one rank is the identity and counts nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from denoised.steps.tally import count

Group = dist.ProcessGroup


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks."""
    if group.size() == 1:
        return x
    result = x.contiguous().clone()
    dist.all_reduce(result, group=group)
    _count("all_reduce", result)
    return result


def all_gather(x: Tensor, group: Group, *, dim: int, sizes: Sequence[int] | None = None) -> Tensor:
    """All ranks' parts side by side along `dim`. `sizes`: each rank's length of `dim`, where they differ."""
    if group.size() == 1:
        return x
    sizes = sizes or [x.shape[dim]] * group.size()
    parts = gather_list(_padded(x, dim, max(sizes)), group)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim=dim)


def gather_list(x: Tensor, group: Group) -> list[Tensor]:
    """All ranks' tensors of one shape, in order of rank."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x, group=group)
    _count("all_gather", x)
    return parts


def all_to_all(parts: Sequence[Tensor], shapes: Sequence[torch.Size], group: Group) -> list[Tensor]:
    """Part r goes to rank r; what rank r has for this one comes back in place r, in shape `shapes[r]`."""
    sent = torch.cat([part.reshape(-1) for part in parts])
    lengths = [shape.numel() for shape in shapes]
    received = sent.new_empty(sum(lengths))
    dist.all_to_all_single(received, sent, lengths, [part.numel() for part in parts], group=group)
    _count("all_to_all", sent)
    return [flat.reshape(shape) for flat, shape in zip(torch.split(received, lengths), shapes, strict=True)]


def broadcast(x: Tensor, group: Group, *, source: int) -> Tensor:
    """Rank `source`'s tensor, on all; `x` gives shape and dtype on the others. `source` counts within the group."""
    if group.size() == 1:
        return x
    result = x.contiguous().clone()
    dist.broadcast(result, group=group, group_src=source)
    _count("broadcast", result)
    return result


def send(x: Tensor, group: Group, *, to: int) -> None:
    """Blocks until it is on its way. `to` counts within the group."""
    x = x.contiguous()
    dist.send(x, group=group, group_dst=to)
    _count("send", x)


class Posted:
    """A tensor on its way; the copy that travels lives as long as this, so the caller may write to its own."""

    def __init__(self, x: Tensor, group: Group, *, to: int) -> None:
        self._copy = x.detach().clone(memory_format=torch.contiguous_format)
        self._work = dist.isend(self._copy, group=group, group_dst=to)
        _count("send", self._copy)

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()


class Arriving:
    """A tensor on its way here, of shape and dtype of `like`. `source` counts within the group."""

    def __init__(self, like: Tensor, group: Group, *, source: int) -> None:
        self._tensor = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        self._work = dist.irecv(self._tensor, group=group, group_src=source)

    def wait(self) -> Tensor:
        if self._work is not None:
            self._work.wait()
        return self._tensor


class Shift:
    """Tensors on their way to the next rank of a ring, and those of the previous one on their way here."""

    def __init__(self, tensors: Sequence[Tensor], group: Group) -> None:
        rank, size = group.rank(), group.size()
        self._sent = [tensor.contiguous() for tensor in tensors]
        self._received = [torch.empty_like(tensor) for tensor in self._sent]
        ops = [dist.P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % size) for x in self._sent]
        ops += [dist.P2POp(dist.irecv, x, group=group, group_peer=(rank - 1) % size) for x in self._received]
        self._works = dist.batch_isend_irecv(ops)
        for x in self._sent:
            _count("ring_shift", x)

    def wait(self) -> list[Tensor]:
        for work in self._works:
            work.wait()
        return self._received


def _padded(x: Tensor, dim: int, length: int) -> Tensor:
    missing = length - x.shape[dim]
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape)], dim=dim)


def _count(name: str, sent: Tensor) -> None:
    count(name)
    count(f"{name}_bytes", sent.numel() * sent.element_size())
