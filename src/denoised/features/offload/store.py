"""Which weights are on the device now. A tensor that several groups have goes when the last one leaves.

Only the thread that runs forwards changes modules. Another one, or another stream of an accelerator, fetches ahead:
what it fetched waits, in no module, until its group is held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from denoised.steps.parts import parts
from denoised.steps.tally import count

Fetched = dict["Cell", Tensor]


@dataclass(frozen=True, kw_only=True)
class Home:
    """Where weights are while they are away.

    away: what stands for a tensor in its module then; None: it has to stay.
    fetch: what stood for a tensor, on the device. May be called by a thread of its own.
    """

    away: Callable[[Tensor], Tensor | None]
    fetch: Callable[[Tensor], Tensor]


class Cell:
    """One tensor and all names that modules have for it; `away` has these names while the tensor is not here."""

    def __init__(self, tensor: Tensor, away: Tensor) -> None:
        self.away, self.users = away, 0
        self.num_bytes = away.nbytes
        self._is_parameter, self._grad = isinstance(tensor, nn.Parameter), tensor.requires_grad
        self._places: list[tuple[dict[str, Any], str]] = []

    def add(self, names: dict[str, Any], name: str) -> None:
        """Another name of the tensor. It has gone from there now."""
        self._places.append((names, name))
        names[name] = self.away

    def put(self, tensor: Tensor) -> None:
        """The tensor is here."""
        value = nn.Parameter(tensor, requires_grad=self._grad) if self._is_parameter else tensor
        for names, name in self._places:
            names[name] = value

    def drop(self) -> None:
        for names, name in self._places:
            names[name] = self.away


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Cells that come and go together."""

    cells: tuple[Cell, ...]

    @property
    def num_bytes(self) -> int:
        return sum(cell.num_bytes for cell in self.cells)


class Store:
    """All cells of a pipeline, and those that are here."""

    def __init__(self, home: Home, device: torch.device) -> None:
        self._home = home
        self._ahead = _Stream(home, device) if device.type == "cuda" else _Thread(home)
        self._cells: dict[int, Cell] = {}
        self._originals: list[Tensor] = []  # what `_cells` knows by address stays alive until all are found
        self._ready: dict[Group, Callable[[], Fetched]] = {}
        self._resident, self._peak = 0, 0

    @property
    def resident(self) -> int:
        """Bytes that are in modules now."""
        return self._resident

    def group(self, modules: Iterable[nn.Module]) -> Group:
        """All tensors of these modules and those below them that can be away. They are, from now on."""
        found: dict[Cell, None] = {}
        for part in (part for module in modules for part in module.modules()):
            for names in (part._parameters, part._buffers):
                for name, tensor in list(names.items()):
                    cell = None if tensor is None else self._cell(tensor)
                    if cell is not None:
                        found[cell] = None
                        cell.add(names, name)
        return Group(cells=tuple(found))

    def settled(self) -> None:
        """All groups are made."""
        self._originals.clear()
        self._cells.clear()

    def _cell(self, tensor: Tensor) -> Cell | None:
        if id(tensor) not in self._cells and not tensor.is_meta:
            away = self._home.away(tensor)
            if away is not None:
                self._originals += [tensor, away]
                self._cells[id(tensor)] = self._cells[id(away)] = Cell(tensor, away)
        return self._cells.get(id(tensor))

    def hold(self, group: Group) -> None:
        """The group's tensors are in their modules until it is let go as often as it was held."""
        ready = self._ready.pop(group, None)
        missing = [cell for cell in group.cells if not cell.users]
        if missing:
            fetched = ready() if ready is not None else {}
            count("offload_fetches")
            count("offload_prefetched", int(ready is not None))
            self._put({cell: fetched[cell] if cell in fetched else self._fetch(cell) for cell in missing})
        for cell in group.cells:
            cell.users += 1

    def _fetch(self, cell: Cell) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return self._home.fetch(cell.away)

    def _put(self, fetched: Fetched) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for cell, tensor in fetched.items():
                cell.put(tensor)
        size = sum(cell.num_bytes for cell in fetched)
        count("offload_bytes", size)
        self._resident += size
        count("offload_peak_bytes", max(0, self._resident - self._peak))  # the sum of what it rose by is the peak
        self._peak = max(self._peak, self._resident)

    def let_go(self, group: Group) -> None:
        for cell in group.cells:
            cell.users -= 1
            if not cell.users:
                cell.drop()
                self._resident -= cell.num_bytes

    def fetch_ahead(self, group: Group) -> None:
        """Begin to fetch it; nothing happens if it is here or on its way."""
        missing = [cell for cell in group.cells if not cell.users]
        if missing and group not in self._ready:
            self._ready[group] = self._ahead.start(missing)

    def forget(self, group: Group) -> None:
        """What was fetched ahead is not needed after all."""
        self._ready.pop(group, None)


class _Thread:
    """Reads ahead on a thread of its own."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="weights-ahead")

    def start(self, cells: list[Cell]) -> Callable[[], Fetched]:
        return self._pool.submit(self._read, cells).result

    def _read(self, cells: list[Cell]) -> Fetched:
        with torch.no_grad():
            found = {cell: self._home.fetch(cell.away) for cell in cells}
        for tensor in found.values():
            _touch(tensor)
        return found


def _touch(tensor: Tensor) -> None:
    """Mapped files are read when somebody looks: at one byte of each page."""
    for part in parts(tensor):
        if part.is_contiguous() and part.numel():
            part.detach().view(-1).view(torch.uint8)[::4096].max()


class _Stream:
    """Copies ahead on a stream of its own, out of pinned memory. What it made is not given back to the stream's
    allocator before the computation that used it is over. Never more than two groups ahead of the computation."""

    def __init__(self, home: Home, device: torch.device) -> None:
        self._home, self._stream = home, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._started: list[torch.cuda.Event] = []

    def start(self, cells: list[Cell]) -> Callable[[], Fetched]:
        self._keep_pace()
        with torch.cuda.stream(self._stream), torch.inference_mode(False), torch.no_grad():
            found = {cell: self._home.fetch(cell.away) for cell in cells}
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)
        return lambda: self._arrived(found, arrived)

    def _arrived(self, found: Fetched, arrived: torch.cuda.Event) -> Fetched:
        current = torch.cuda.current_stream()
        current.wait_event(arrived)
        for part in (part for tensor in found.values() for part in parts(tensor)):
            part.record_stream(current)
        return found

    def _keep_pace(self) -> None:
        """The host runs ahead of the device; memory must not. So wait for what computed before the last."""
        now = torch.cuda.Event()  # type: ignore[no-untyped-call]
        now.record(torch.cuda.current_stream())
        self._started.append(now)
        if len(self._started) > 2:
            self._started.pop(0).synchronize()
