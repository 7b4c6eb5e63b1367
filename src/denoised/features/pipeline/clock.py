"""When this rank ran its own blocks, when it waited for others, and in what order things happened.

On an accelerator times are events of its stream, read only when somebody asks: measuring waits for nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

What = Literal["start", "begin", "end", "wait", "resume", "output"]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """Something that happened on this rank: it began or ended one of its blocks for a row, waited for another stage
    and resumed, or got a row's output."""

    row: int
    what: What
    time: Any


class Clock:
    """Marks since the last `start`, in order."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.row = 0
        self.marks: list[Mark] = []

    def at(self, device: torch.device) -> None:
        """Forwards run there from now on; times of two clocks cannot be compared."""
        if device.type != self.device.type:
            self.device = device
            self.start()
        self.device = device

    def start(self) -> None:
        self.row, self.marks = 0, []
        self.mark("start")

    def mark(self, what: What) -> None:
        self.marks.append(Mark(row=self.row, what=what, time=self._now()))

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        self.mark("begin")
        yield
        self.mark("end")

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        self.mark("wait")
        yield
        self.mark("resume")

    def bubble(self) -> float:
        """The share of the time, from the start to the last output, in which this rank waited for others."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        waited = sum(self._seconds(a, b) for a, b in pairs if (a.what, b.what) == ("wait", "resume"))
        return waited / max(self._seconds(self.marks[0], self.marks[-1]), 1e-9) if self.marks else 0.0

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
