"""Collectives inside a forward, each counted by name (`tally`). Functional: arguments are never written to.

Inference only: nothing here has a gradient. A group of one rank is the identity and counts nothing. Ranks that share
a machine's memory read from a board (`boards`); others send messages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from denoised.steps.boards import LETTER_BYTES, SLOT_BYTES, Board, Turn, board_of, fits, made_board
from denoised.steps.tally import count

Group = dist.ProcessGroup


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """The sum over ranks."""
    if group.size() == 1:
        return x
    _count("all_reduce", x)
    turn = _published(x, group)
    if turn is not None:
        return _sum([_as(turn.of(rank), x) for rank in range(group.size())])
    result = x.contiguous().clone()
    dist.all_reduce(result, group=group)
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
    _count("all_gather", x)
    turn = _published(x, group)
    if turn is not None:
        return [_as(turn.of(rank), x).clone() for rank in range(group.size())]
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(parts, x, group=group)
    return parts


def gather_into(output: Tensor, x: Tensor, group: Group) -> None:
    """All ranks' flat tensors of one length, one after the other, in `output`, of which `x` may be this rank's part.
    Not counted: whoever gathers weights does that."""
    board = board_of(group, x.device)
    if board is None:
        dist.all_gather_into_tensor(output, x, group=group)
        return
    rows, step = output.view(group.size(), -1), SLOT_BYTES // x.element_size()
    for start in range(0, x.numel(), step):
        part = x[start : start + step]
        turn = board.publish([part]).wait()
        for rank in range(group.size()):
            if rank != group.rank() or rows[rank].data_ptr() != x.data_ptr():
                rows[rank, start : start + step].copy_(_as(turn.of(rank), part))


def all_to_all(parts: Sequence[Tensor], shapes: Sequence[torch.Size], group: Group) -> list[Tensor]:
    """Part r goes to rank r; what rank r has for this one comes back in place r, in shape `shapes[r]`."""
    received = exchange([[part] for part in parts], [[shape] for shape in shapes], group)
    return [column[0].clone() for column in received]


def exchange(
    sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[torch.Size]], group: Group
) -> list[list[Tensor]]:
    """Tensors `sent[r]`, all of one dtype, go to rank r; what rank r has for this one comes back in place r, in shapes
    `shapes[r]`. To be read before the next exchange: others may write there then."""
    rank, num = group.rank(), len(shapes[0])
    flat = [part for parts in sent for part in parts]
    _count("all_to_all", *flat)
    turn = _posted(flat, group)
    if turn is None or not turn.wait().is_whole():
        return _messages(sent, shapes, group)

    def found(r: int) -> list[Tensor]:
        return [turn.of(r, rank * num + i).view(flat[0].dtype).view(shape) for i, shape in enumerate(shapes[r])]

    return [list(sent[r]) if r == rank else found(r) for r in range(len(shapes))]


def _messages(
    sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[torch.Size]], group: Group
) -> list[list[Tensor]]:
    flat = torch.cat([part.reshape(-1) for parts in sent for part in parts])
    lengths = [sum(shape.numel() for shape in row) for row in shapes]
    given = [sum(part.numel() for part in parts) for parts in sent]
    received = flat.new_empty(sum(lengths))
    dist.all_to_all_single(received, flat, lengths, given, group=group)
    pieces = iter(torch.split(received, [shape.numel() for row in shapes for shape in row]))
    return [[next(pieces).view(shape) for shape in row] for row in shapes]


def broadcast(x: Tensor, group: Group, *, source: int) -> Tensor:
    """Rank `source`'s tensor, on all; `x` gives shape and dtype on the others. `source` counts within the group."""
    if group.size() == 1:
        return x
    _count("broadcast", x)
    turn = _published(x, group, source)
    if turn is not None:
        return _as(turn.of(source), x).clone()  # also at the source: nobody gets somebody else's tensor
    result = x.contiguous().clone()
    dist.broadcast(result, group=group, group_src=source)
    return result


def send(x: Tensor, group: Group, *, to: int) -> None:
    """Blocks until it is on its way. `to` counts within the group."""
    x = x.contiguous()
    dist.send(x, group=group, group_dst=to)
    _count("send", x)


class Posted:
    """A tensor on its way; the caller may write to its own at once."""

    def __init__(self, x: Tensor, group: Group, *, to: int) -> None:
        _count("send", x)
        board = _letterbox(x, group)
        if board is not None:
            board.outbox(to).send(x)
            self._work, self._copy = None, None
        else:
            self._copy = x.detach().clone(memory_format=torch.contiguous_format)
            self._work = dist.isend(self._copy, group=group, group_dst=to)

    def wait(self) -> None:
        """Until the copy is not needed any more."""
        if self._work is not None:
            self._work.wait()


class Arriving:
    """A tensor on its way here, of shape and dtype of `like`. `source` counts within the group."""

    def __init__(self, like: Tensor, group: Group, *, source: int) -> None:
        self._tensor = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        board = _letterbox(like, group)
        if board is not None:
            inbox = board.inbox(source)
            self._wait: Callable[[], object] = functools.partial(inbox.wait, inbox.expect(self._tensor))
        else:
            work = dist.irecv(self._tensor, group=group, group_src=source)
            self._wait = work.wait if work is not None else _nothing

    def wait(self) -> Tensor:
        self._wait()
        return self._tensor


def _nothing() -> None:
    """There is nothing to wait for."""


class Shift:
    """Tensors on their way to the next rank of a ring, and those of the previous one on their way here."""

    def __init__(self, tensors: Sequence[Tensor], group: Group) -> None:
        self._like, self._source = list(tensors), (group.rank() - 1) % group.size()
        for x in tensors:
            _count("ring_shift", x)
        self._turn = _posted(tensors, group) if fits(tensors) else None
        if self._turn is None:
            self._send(group)

    def _send(self, group: Group) -> None:
        rank, size = group.rank(), group.size()
        self._sent = [tensor.contiguous() for tensor in self._like]
        self._received = [torch.empty_like(tensor) for tensor in self._sent]
        ops = [dist.P2POp(dist.isend, x, group=group, group_peer=(rank + 1) % size) for x in self._sent]
        ops += [dist.P2POp(dist.irecv, x, group=group, group_peer=self._source) for x in self._received]
        self._works = dist.batch_isend_irecv(ops)

    def wait(self) -> list[Tensor]:
        if self._turn is not None:
            turn = self._turn.wait()
            return [_as(turn.of(self._source, part), x).clone() for part, x in enumerate(self._like)]
        for work in self._works:
            work.wait()
        return self._received


def _posted(parts: Sequence[Tensor], group: Group) -> Turn | None:
    """What this rank has for the others, if the group has a board."""
    board = board_of(group, parts[0].device)
    return None if board is None else board.publish(parts)


def _published(x: Tensor, group: Group, source: int | None = None) -> Turn | None:
    """A tensor that is as large on all ranks, of `source` or of everybody, and can be read now."""
    if not fits([x]) or (board := board_of(group, x.device)) is None:
        return None
    return board.publish([x] if source in (None, group.rank()) else []).wait()


def _letterbox(x: Tensor, group: Group) -> Board | None:
    """Where a letter between two ranks goes, if the whole group has made a board before: the same answer on both."""
    fits = x.device.type == "cpu" and x.numel() * x.element_size() <= LETTER_BYTES
    return made_board(group) if fits else None


def _as(raw: Tensor, like: Tensor) -> Tensor:
    return raw.view(like.dtype).reshape(like.shape)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """In order of rank, so that it is the same everywhere; of many small floats, rounded once."""
    if len(parts) == 2 or not parts[0].is_floating_point():
        return functools.reduce(torch.add, parts)
    return functools.reduce(torch.add, (part.float() if part.itemsize < 4 else part for part in parts)).to(
        parts[0].dtype
    )


def _padded(x: Tensor, dim: int, length: int) -> Tensor:
    missing = length - x.shape[dim]
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape)], dim=dim)


def _count(name: str, *sent: Tensor) -> None:
    count(name)
    count(f"{name}_bytes", sum(x.numel() * x.element_size() for x in sent))
