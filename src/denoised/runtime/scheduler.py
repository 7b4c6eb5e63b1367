"""Which requests run now, in which replica, and which wait. Pure Python: no torch, no threads, and no clock, since the
time is an argument; tested alone.

Order of the queue: priority; then tenants, by what they have had over their weight; then the nearer deadline; then
arrival. At most `max_num_seqs` run at once in each replica, and only what its memory holds: the first in line waits
for room, and nobody overtakes it, so that large requests are not starved.

A request waits here until some replica has room, and then goes to the one with the least predicted work left, so that
one heavy request weighs as much as many light ones. A request that was in flight when ranks died stays with its
replica, so that what kills ranks cannot go round all replicas; after two such deaths it runs alone there, so that the
next one tells who causes them.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

from denoised.request import Service
from denoised.runtime.cost import Cost
from denoised.runtime.fair import FairClock
from denoised.runtime.room import Need

ALONE_AFTER = 2
GIVE_UP_AFTER = 3


@dataclass(kw_only=True)
class Entry:
    """A request the scheduler knows. `left` is what it probably still costs; `seconds` what its tenant is charged for
    it; `number` its arrival; `since` and `deadline` are times. `first`: it was in flight already."""

    request_id: str
    number: int
    cost: Cost
    left: float
    seconds: float
    service: Service = Service()
    need: Need = Need()
    since: float = 0.0
    deadline: float = math.inf
    steps_left: float = 0.0
    begun: bool = False
    crashes: int = 0
    first: bool = False

    @property
    def alone(self) -> bool:
        return self.crashes >= ALONE_AFTER

    @property
    def is_tenants_first(self) -> tuple[bool, int, float, int]:
        """What sorts the requests of one tenant."""
        return (not self.first, -self.service.priority, self.deadline, self.number)


class Lane:
    """One replica: what runs there, and what will run there again. `room`: bytes for requests."""

    def __init__(self, number: int, size: int, room: float = math.inf) -> None:
        self.number, self._size, self._room = number, size, room
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
        if len(self.running) >= (1 if entry.alone else self._size):
            return False
        needs = [other.need for other in (*self.running.values(), entry)]
        together = sum(need.resident for need in needs) + max(need.working for need in needs)
        return together <= self._room or not self.running


class Scheduler:
    """The queue of waiting requests, and a lane for each replica."""

    def __init__(self, max_num_seqs: int, num_replicas: int = 1, *, room: float = math.inf) -> None:
        self._waiting: list[Entry] = []
        self._lanes = [Lane(number, max_num_seqs, room) for number in range(num_replicas)]
        self._alive = set(range(num_replicas))
        self._tenants = FairClock()
        self._count = 0

    @property
    def running(self) -> list[str]:
        return [request_id for lane in self._lanes for request_id in lane.running]

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + sum(len(lane.again) for lane in self._lanes)

    @property
    def lanes(self) -> list[list[Entry]]:
        """What runs, or will run again, in each replica."""
        return [[*lane.running.values(), *lane.again] for lane in self._lanes]

    def replica_of(self, request_id: str) -> int | None:
        """Where a request runs; None if it does not."""
        return next((lane.number for lane in self._lanes if request_id in lane.running), None)

    @property
    def open_replicas(self) -> list[int]:
        """Those whose ranks are there."""
        return [lane.number for lane in self._lanes if lane.open]

    @property
    def busy_replicas(self) -> list[int]:
        """Those whose ranks are there and have something to do."""
        return [lane.number for lane in self._lanes if lane.open and lane.running]

    def loads(self) -> list[float]:
        """Predicted work left in each replica."""
        return [lane.load[0] for lane in self._lanes]

    # ---- requests

    def add(
        self,
        request_id: str,
        cost: Cost | None = None,
        *,
        service: Service = Service(),  # noqa: B008  frozen
        seconds: float | None = None,
        need: Need = Need(),  # noqa: B008  frozen
        now: float = 0.0,
    ) -> None:
        """Queue a request. `seconds`: predicted; the cost in its own unit if left out."""
        cost = cost or Cost()
        entry = Entry(
            request_id=request_id,
            number=self._count,
            cost=cost,
            left=cost.total,
            seconds=cost.total if seconds is None else seconds,
            service=service,
            need=need,
            since=now,
            deadline=math.inf if service.timeout is None else now + service.timeout,
            steps_left=cost.steps,
        )
        self._count += 1
        self._tenants.enter(service.tenant)
        self._waiting.append(entry)

    def queue(self) -> list[Entry]:
        """What waits, in the order in which it will start, as far as is known now."""
        waits: dict[str, list[Entry]] = {}
        for entry in sorted(self._waiting, key=lambda entry: entry.is_tenants_first, reverse=True):
            waits.setdefault(entry.service.tenant, []).append(entry)
        had = {tenant: self._tenants.time(tenant) for tenant in waits}
        order = []
        while waits:
            tenant = min(waits, key=lambda name: _turn(waits[name][-1], had[name]))
            entry = waits[tenant].pop()
            had[tenant] += entry.seconds / entry.service.weight
            order.append(entry)
            if not waits[tenant]:
                del waits[tenant]
        return order

    def _next(self) -> Entry | None:
        return min(self._waiting, key=lambda e: _turn(e, self._tenants.time(e.service.tenant)), default=None)

    def admit(self) -> list[str]:
        """Requests to start now, each at its `replica_of`; they count as running from here on."""
        admitted = []
        for lane in self._lanes:
            while lane.again and lane.fits(lane.again[0]):
                admitted.append(_start(lane, lane.again.popleft()))
        while (entry := self._next()) is not None and (lanes := self._lanes_for(entry)):
            self._waiting.remove(entry)
            self._tenants.charge(entry.service.tenant, entry.seconds, entry.service.weight)
            self._tenants.leave(entry.service.tenant)
            admitted.append(_start(min(lanes, key=lambda lane: lane.load), entry))
        return admitted

    def _lanes_for(self, entry: Entry) -> list[Lane]:
        return [lane for lane in self._lanes if not lane.again and lane.fits(entry)]

    def progress(self, request_id: str, step: int, total_steps: int) -> None:
        """So many steps are done; what is left weighs less."""
        for lane in self._lanes:
            if (entry := lane.running.get(request_id)) is not None:
                entry.steps_left, entry.begun = max(0, total_steps - step), True
                entry.left = entry.cost.per_step * entry.steps_left

    def remove(self, request_id: str, seconds: float | None = None) -> bool:
        """Forget a request that ended or was cancelled; True if it was running.

        seconds: what it took in truth, which its tenant is charged instead of what was predicted.
        """
        for entry in [e for e in self._waiting if e.request_id == request_id]:
            self._waiting.remove(entry)
            self._tenants.leave(entry.service.tenant)
        was_running = False
        for lane in self._lanes:
            lane.again = deque(e for e in lane.again if e.request_id != request_id)
            if (ran := lane.running.pop(request_id, None)) is not None:
                was_running = True
                if seconds is not None:
                    self._tenants.charge(ran.service.tenant, seconds - ran.seconds, ran.service.weight)
        return was_running

    def stopping(self, request_id: str) -> None:
        """It was told to end: its deadline is over."""
        for lane in self._lanes:
            if request_id in lane.running:
                lane.running[request_id].deadline = math.inf

    def expired(self, now: float) -> list[str]:
        """Requests past their deadline, wherever they stand."""
        everyone = [*self._waiting, *(entry for lane in self.lanes for entry in lane)]
        return [entry.request_id for entry in everyone if entry.deadline <= now]

    def next_deadline(self) -> float:
        """When the next one is, or never."""
        everyone = [*self._waiting, *(entry for lane in self.lanes for entry in lane)]
        return min((entry.deadline for entry in everyone), default=math.inf)

    # ---- replicas

    def crashed(self, replica: int = 0) -> tuple[list[str], list[str]]:
        """A replica's ranks were lost: (requests that run again, first in line and in their order; those given up)."""
        lane = self._lanes[replica]
        entries, lane.running = list(lane.running.values()), {}
        for entry in entries:
            entry.crashes += 1
            entry.left, entry.steps_left, entry.begun, entry.first = entry.cost.total, entry.cost.steps, False, True
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
        for entry in lane.again:
            self._tenants.enter(entry.service.tenant)
        self._waiting[:0] = lane.again
        lane.again.clear()
        return bool(self._alive)


def _turn(entry: Entry, had: float) -> tuple[bool, int, float, float, int]:
    """What sorts requests of all tenants: of one that has had the least so far, the highest first."""
    return (not entry.first, -entry.service.priority, had, entry.deadline, entry.number)


def _start(lane: Lane, entry: Entry) -> str:
    lane.running[entry.request_id] = entry
    return entry.request_id
