"""What ranks say to each other in a tick: one fixed-size header, errors if there are any, and the predictions.

Every rank calls the same methods in the same order. The header carries a digest of what the rank is about to
exchange: ranks that do not agree stop at once (`DesyncError`) instead of waiting for each other for ever.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from denoised.errors import EngineError
from denoised.steps import apart
from denoised.steps.boards import board_of
from denoised.steps.collectives import gather_list

Key = Any


class DesyncError(EngineError):
    """Ranks do not run the same program any more; the only way out is to start them again."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What all ranks said: whether any had errors, or outputs whose layout is news; whether rank 0 has commands; and
    the seconds that each ran calls since the last one, and those that it worked at all: equal on all."""

    errors: bool
    news: bool
    commands: bool
    ran: tuple[float, ...]
    worked: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """One output on its way: who computed it. A key is equal on all ranks; its first part is the task."""

    rank: int
    key: Key


class Wire:
    """Collectives between forwards. `control` is a CPU group of all ranks of one engine; `data` is the group of the
    cfg axis, over which predictions travel: a parcel's rank counts within it."""

    def __init__(self, *, control: dist.ProcessGroup, data: dist.ProcessGroup, device: torch.device) -> None:
        self._control, self._data, self._device = control, data, device
        self.rank, self.size = dist.get_rank(control), dist.get_world_size(control)
        self.place, self._num_places = dist.get_rank(data), dist.get_world_size(data)
        self._layouts: dict[Key, apart.Layout] = {}
        self._flat: dict[Key, tuple[list[torch.Tensor], Any]] = {}
        self.num_exchanges = 0

    def carries(self, tree: Any, *, max_bytes: int | None = None) -> bool:
        """Whether `tree` can travel, and comes out as what it was; no larger than that, if it is given."""
        try:
            leaves, _ = apart.flatten(tree)
        except TypeError:
            return False
        here = self._device.type
        if max_bytes is not None and apart.layout(leaves, None).num_bytes > max_bytes:
            return False
        return all(x.device.type == here and x.layout == torch.strided and not x.requires_grad for x in leaves)

    def prepare(self, outputs: dict[Key, Any]) -> dict[Key, str]:
        """Take this rank's outputs apart for the next exchange; why some of them cannot travel."""
        self._flat, problems = {}, {}
        for key, tree in outputs.items():
            try:
                self._flat[key] = apart.flatten(tree)
            except TypeError as error:
                problems[key] = str(error)
        return problems

    def header(
        self,
        *,
        digest: int,
        errors: bool,
        commands: bool,
        ran: float = 0.0,
        worked: float = 0.0,
        patience: float | None = None,
    ) -> Header:
        """Agree on what comes next.

        Args:
            ran, worked: seconds of this rank.
            patience: seconds to wait for the others, where they may be stuck in a forward that failed here.

        Raises:
            DesyncError: the digests differ, or the others did not come in time.
        """
        # The sender knows whether a layout is news: what others remember is what it told them.
        news = any(self._layouts.get(key) != apart.layout(*flat) for key, flat in self._flat.items())
        times = (round(ran * 1e6), round(worked * 1e6))
        mine = torch.tensor([digest, errors, commands, news, *times], dtype=torch.int64)
        table = [row.tolist() for row in self._told(mine, patience)]
        if any(row[0] != digest for row in table):
            raise DesyncError(f"rank {self.rank}: ranks disagree about the next exchange")
        return Header(
            errors=any(bool(row[1]) for row in table),
            news=any(bool(row[3]) for row in table),
            commands=bool(table[0][2]),
            ran=tuple(row[4] / 1e6 for row in table),
            worked=tuple(row[5] / 1e6 for row in table),
        )

    def _told(self, mine: torch.Tensor, patience: float | None) -> list[torch.Tensor]:
        """What each rank says; of `mine`'s shape."""
        try:
            return self._heard(mine, patience)
        except (RuntimeError, TimeoutError) as error:
            if patience is None:
                raise
            raise DesyncError(f"rank {self.rank} failed in a forward that other ranks are still in") from error

    def _heard(self, mine: torch.Tensor, patience: float | None) -> list[torch.Tensor]:
        board = board_of(self._control, mine.device)
        if board is not None:
            turn = board.publish([mine]).wait(patience)
            return [turn.of(rank).view(mine.dtype) for rank in range(self.size)]
        table = [torch.empty_like(mine) for _ in range(self.size)]
        work = dist.all_gather(table, mine, group=self._control, async_op=True)
        work.wait(*(() if patience is None else (datetime.timedelta(seconds=patience),)))
        return table

    def gather_objects(self, mine: Any) -> list[Any]:
        """A small object from every rank."""
        table: list[Any] = [None] * self.size
        dist.all_gather_object(table, mine, group=self._control)
        return table

    def from_first(self, value: Any) -> Any:
        """Rank 0's object, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self._control, 0), group=self._control)
        return box[0]

    def learn_layouts(self) -> None:
        """Layouts of all ranks' prepared outputs; they travel only when a header says that there are new ones."""
        for table in self.gather_objects({key: apart.layout(*flat) for key, flat in self._flat.items()}):
            self._layouts.update(table)

    def forget(self, task_id: str) -> None:
        """Drop what is known of a task that is over."""
        self._layouts = {key: layout for key, layout in self._layouts.items() if key[0] != task_id}

    def exchange(self, parcels: list[Parcel], mine: dict[Key, Any]) -> dict[Key, Any]:
        """Every rank's prepared outputs, by key. `parcels` names all of them, in an order equal on all ranks."""
        if not parcels or self._num_places == 1:
            return dict(mine)
        places = range(self._num_places)
        sizes = [sum(self._layouts[p.key].num_bytes for p in parcels if p.rank == r) for r in places]
        send = torch.zeros(max(sizes), dtype=torch.uint8, device=self._device)
        self._pack(send, [leaf for p in parcels if p.rank == self.place for leaf in self._flat[p.key][0]])
        self._flat = {}
        received = gather_list(send, self._data)
        self.num_exchanges += 1
        return self._unpack(parcels, received) | mine

    @staticmethod
    def _pack(buffer: torch.Tensor, leaves: list[Any]) -> None:
        start = 0
        for leaf in leaves:
            raw = leaf.detach().reshape(-1).contiguous().view(torch.uint8)
            buffer[start : start + raw.numel()] = raw
            start += raw.numel()

    def _unpack(self, parcels: list[Parcel], received: list[torch.Tensor]) -> dict[Key, Any]:
        offsets, result = [0] * self._num_places, {}
        for parcel in parcels:
            layout = self._layouts[parcel.key]
            if parcel.rank != self.place:
                result[parcel.key] = apart.together(layout, received[parcel.rank], offsets[parcel.rank])
            offsets[parcel.rank] += layout.num_bytes
        return result
