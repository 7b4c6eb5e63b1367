"""Which requests run now and which wait. Pure Python: no torch, no threads, no clock; tested by itself.

First come, first served, at most `max_num_seqs` at once. A request that was in flight when ranks died twice runs alone
from then on, so that the next crash tells who causes them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

ALONE_AFTER = 2
GIVE_UP_AFTER = 3


@dataclass(kw_only=True)
class Entry:
    """A request the scheduler knows."""

    request_id: str
    crashes: int = 0

    @property
    def alone(self) -> bool:
        return self.crashes >= ALONE_AFTER


class Scheduler:
    """Queue of waiting requests and set of running ones."""

    def __init__(self, max_num_seqs: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._waiting: deque[Entry] = deque()
        self._running: dict[str, Entry] = {}

    @property
    def running(self) -> list[str]:
        return list(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, request_id: str) -> None:
        self._waiting.append(Entry(request_id=request_id))

    def admit(self) -> list[str]:
        """Requests to start now; they count as running from here on."""
        admitted = []
        while self._waiting and self._fits(self._waiting[0]):
            entry = self._waiting.popleft()
            self._running[entry.request_id] = entry
            admitted.append(entry.request_id)
        return admitted

    def _fits(self, entry: Entry) -> bool:
        if any(other.alone for other in self._running.values()):
            return False
        return len(self._running) < (1 if entry.alone else self._max_num_seqs)

    def remove(self, request_id: str) -> bool:
        """Forget a request that ended or was cancelled; True if it was running."""
        self._waiting = deque(e for e in self._waiting if e.request_id != request_id)
        return self._running.pop(request_id, None) is not None

    def crashed(self) -> tuple[list[str], list[str]]:
        """All ranks were lost: (requests that run again, first in line and in their order; requests given up)."""
        entries, self._running = list(self._running.values()), {}
        for entry in entries:
            entry.crashes += 1
        again = [e for e in entries if e.crashes < GIVE_UP_AFTER]
        self._waiting.extendleft(reversed(again))
        return [e.request_id for e in again], [e.request_id for e in entries if e.crashes >= GIVE_UP_AFTER]
