"""Which requests run now, in which replica, and which wait. Pure Python: no torch, no threads, no clock; tested alone.

First come, first served, at most `max_num_seqs` at once in each replica. A request waits here until some replica has
room, and then goes to the one with the least predicted work left, so that one heavy request weighs as much as many
light ones. A request that was in flight when ranks died stays with its replica, so that what kills ranks cannot go
round all replicas; after two such deaths it runs alone there, so that the next one tells who causes them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from denoised.runtime.cost import Cost

ALONE_AFTER = 2
GIVE_UP_AFTER = 3


@dataclass(kw_only=True)
class Entry:
    """A request the scheduler knows. `left` is what it probably still costs."""

    request_id: str
    cost: Cost
    left: float
    crashes: int = 0

    @property
    def alone(self) -> bool:
        return self.crashes >= ALONE_AFTER


class Lane:
    """One replica: what runs there, and what will run there again."""

    def __init__(self, number: int, size: int) -> None:
        self.number, self._size = number, size
        self.open = True
        self.running: dict[str, Entry] = {}
        self.again: deque[Entry] = deque()

    @property
    def load(self) -> tuple[float, int, int]:
        """Work left; ties go to the lane that runs fewer requests, then to the first."""
        return sum(entry.left for entry in self.running.values()), len(self.running), self.number

    def fits(self, entry: Entry) -> bool:
        if not self.open or any(other.alone for other in self.running.values()):
            return False
        return len(self.running) < (1 if entry.alone else self._size)


class Scheduler:
    """The queue of waiting requests, and a lane for each replica."""

    def __init__(self, max_num_seqs: int, num_replicas: int = 1) -> None:
        self._waiting: deque[Entry] = deque()
        self._lanes = [Lane(number, max_num_seqs) for number in range(num_replicas)]
        self._alive = set(range(num_replicas))

    @property
    def running(self) -> list[str]:
        return [request_id for lane in self._lanes for request_id in lane.running]

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + sum(len(lane.again) for lane in self._lanes)

    def replica_of(self, request_id: str) -> int | None:
        """Where a request runs; None if it does not."""
        return next((lane.number for lane in self._lanes if request_id in lane.running), None)

    @property
    def open_replicas(self) -> list[int]:
        """Those whose ranks are there."""
        return [lane.number for lane in self._lanes if lane.open]

    def loads(self) -> list[float]:
        """Predicted work left in each replica."""
        return [lane.load[0] for lane in self._lanes]

    # ---- requests

    def add(self, request_id: str, cost: Cost | None = None) -> None:
        cost = cost or Cost()
        self._waiting.append(Entry(request_id=request_id, cost=cost, left=cost.total))

    def admit(self) -> list[str]:
        """Requests to start now, each at its `replica_of`; they count as running from here on."""
        admitted = []
        for lane in self._lanes:
            while lane.again and lane.fits(lane.again[0]):
                admitted.append(_start(lane, lane.again.popleft()))
        while self._waiting and (lanes := self._lanes_for(self._waiting[0])):
            lane = min(lanes, key=lambda lane: lane.load)
            admitted.append(_start(lane, self._waiting.popleft()))
        return admitted

    def _lanes_for(self, entry: Entry) -> list[Lane]:
        return [lane for lane in self._lanes if not lane.again and lane.fits(entry)]

    def progress(self, request_id: str, step: int, total_steps: int) -> None:
        """So many steps are done; what is left weighs less."""
        for lane in self._lanes:
            if (entry := lane.running.get(request_id)) is not None:
                entry.left = entry.cost.per_step * max(0, total_steps - step)

    def remove(self, request_id: str) -> bool:
        """Forget a request that ended or was cancelled; True if it was running."""
        self._waiting = deque(e for e in self._waiting if e.request_id != request_id)
        for lane in self._lanes:
            lane.again = deque(e for e in lane.again if e.request_id != request_id)
        return any(lane.running.pop(request_id, None) is not None for lane in self._lanes)

    # ---- replicas

    def crashed(self, replica: int = 0) -> tuple[list[str], list[str]]:
        """A replica's ranks were lost: (requests that run again, first in line and in their order; those given up)."""
        lane = self._lanes[replica]
        entries, lane.running = list(lane.running.values()), {}
        for entry in entries:
            entry.crashes += 1
            entry.left = entry.cost.total
        again = [e for e in entries if e.crashes < GIVE_UP_AFTER]
        lane.again.extendleft(reversed(again))
        return [e.request_id for e in again], [e.request_id for e in entries if e.crashes >= GIVE_UP_AFTER]

    def pause(self, replica: int) -> None:
        """Admit nothing there: its ranks are being started."""
        self._lanes[replica].open = False

    def resume(self, replica: int) -> None:
        self._lanes[replica].open = True

    def abandon(self, replica: int) -> bool:
        """That replica will not come back: its requests are anyone's. True if there is another."""
        self.pause(replica)
        self._alive.discard(replica)
        lane = self._lanes[replica]
        self._waiting.extendleft(reversed(lane.again))
        lane.again.clear()
        return bool(self._alive)


def _start(lane: Lane, entry: Entry) -> str:
    lane.running[entry.request_id] = entry
    return entry.request_id
