"""Give every rank of a group the outputs of all branches: item i is computed by rank i mod n.

Ranks first tell each other shapes and errors, so that all of them go on, or none does. This file does not know what a
branch is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

Outputs: TypeAlias = tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """What a rank needs to know of a tensor in order to receive it."""

    shape: torch.Size
    dtype: torch.dtype
    device_type: str

    def empty(self) -> torch.Tensor:
        # No index: each rank receives on its own current device.
        return torch.empty(self.shape, dtype=self.dtype, device=self.device_type)


@dataclass(frozen=True, kw_only=True)
class _Report:
    """What a rank tells the others before any data travels, so that all of them go on, or none does."""

    num_items: int
    layouts: list[tuple[_Layout, ...]]
    error: str | None


def exchange(group: dist.ProcessGroup, run: Callable[[], list[Outputs]], *, num_items: int) -> list[Outputs]:
    """Call `run` for this rank's items, and give every rank all of them: item i is the (i // n)th of rank i mod n.

    Raises:
        RuntimeError: `run` failed on another rank. Where it failed here, its own exception.
        ValueError: the ranks disagree on num_items.
    """
    mine, error = _attempt(run)
    reports = _all_reports(group, _report(mine, error, num_items))
    _raise_if_failed(reports, error)
    rank, size = dist.get_rank(group), len(reports)
    places = [(i % size, i // size) for i in range(num_items)]
    outputs = [mine[k] if owner == rank else _receivers(reports[owner].layouts[k]) for owner, k in places]
    _broadcast(group, outputs)
    return outputs


def _attempt(run: Callable[[], list[Outputs]]) -> tuple[list[Outputs], Exception | None]:
    """Not for what ends the process: KeyboardInterrupt and SystemExit pass."""
    try:
        return [tuple(tensor.detach().contiguous() for tensor in output) for output in run()], None
    except Exception as error:
        return [], error


def _report(mine: list[Outputs], error: Exception | None, num_items: int) -> _Report:
    layouts = [tuple(_Layout(shape=t.shape, dtype=t.dtype, device_type=t.device.type) for t in o) for o in mine]
    message = None if error is None else f"{type(error).__name__}: {error}"
    return _Report(num_items=num_items, layouts=layouts, error=message)


def _all_reports(group: dist.ProcessGroup, report: _Report) -> list[_Report]:
    reports: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, report, group=group)
    return reports


def _raise_if_failed(reports: list[_Report], error: Exception | None) -> None:
    if error is not None:
        raise error
    for rank, report in enumerate(reports):
        if report.error is not None:
            raise RuntimeError(f"rank {rank} of the CFG group failed: {report.error}")
    if len({report.num_items for report in reports}) > 1:
        raise ValueError(f"the ranks have different numbers of branches: {[report.num_items for report in reports]}")


def _receivers(layouts: tuple[_Layout, ...]) -> Outputs:
    return tuple(layout.empty() for layout in layouts)


def _broadcast(group: dist.ProcessGroup, outputs: list[Outputs]) -> None:
    """Fill in place; item i comes from rank i mod n. As bytes, because no backend sends every dtype."""
    size = dist.get_world_size(group)
    sent = [(tensor.reshape(-1).view(torch.uint8), i % size) for i, output in enumerate(outputs) for tensor in output]
    works = [dist.broadcast(data, group=group, group_src=source, async_op=True) for data, source in sent]
    for work in works:
        work.wait()
