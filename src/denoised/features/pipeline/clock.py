"""When this rank was busy with its own blocks, and in what order things happened.

On an accelerator times are events of its stream, read only when somebody asks: measuring waits for nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

What = Literal["begin", "end", "output"]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something that happened on this rank: it began or ended one of its blocks for a row, or got a row's output."""

    row: int
    what: What
    time: Any


class Clock:
    """Marks since the last `start`, in order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.row = 0
        self.marks: list[Mark] = []

    def start(self) -> None:
        self.row, self.marks = 0, []

    def mark(self, what: What, row: int | None = None) -> None:
        self.marks.append(Mark(row=self.row if row is None else row, what=what, time=self._now()))

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        self.mark("begin")
        yield
        self.mark("end")

    def bubble(self) -> float:
        """The share of the time, from the first block begun to the last output, in which this rank ran no block."""
        if len(self.marks) < 2:
            return 0.0
        pairs = zip(self.marks, self.marks[1:], strict=False)
        busy = sum(self._seconds(a, b) for a, b in pairs if (a.what, b.what) == ("begin", "end"))
        return 1.0 - busy / max(self._seconds(self.marks[0], self.marks[-1]), 1e-9)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _seconds(self, first: Mark, last: Mark) -> float:
        if self.device.type != "cuda":
            return float(last.time - first.time)
        last.time.synchronize()
        return float(first.time.elapsed_time(last.time)) / 1000
