"""When each request will be done, as far as is known now: what running ones and queued ones still take, shared out as
the ranks share it out (runtime/turns.py), each ended one making room for the next in line.

Knows how long steps take from the ranks (`StepCost`), and encoders and VAEs from requests that ended; of requests
unlike any before, by their tokens. Pure Python; no clock. Requests that are yet to come are not foreseen.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from denoised.runtime.cost import Cost
from denoised.runtime.cost_model import middle
from denoised.runtime.protocol import StepCost

# Seconds of a token's step before anything was measured.
FIRST_GUESS = 1e-4
# Measurements of encoders and VAEs that count, the last ones.
KEPT = 5
# How much of a new one goes into the average of how forecasts came true; one further off than this says no more.
NEWS, FAR_OFF = 0.2, 2.0


@dataclass(frozen=True, kw_only=True)
class Ends:
    """Seconds before a request's first step and after its last one."""

    before: float = 0.0
    after: float = 0.0


class Times:
    """What requests of each size take. Sizes are tokens x branches x outputs of a step (`Cost.per_step`)."""

    def __init__(self) -> None:
        self._steps: dict[float, StepCost] = {}
        self._ends: dict[float, tuple[Ends, ...]] = {}
        self.stretch = 1.0
        """How many times the foreseen seconds it has lately been: ranks that wait, ticks that cannot be shared."""

    def learn_step(self, size: float, cost: StepCost) -> None:
        """Ranks' latest word on a step of this size. A crowd as large as it never was keeps what is known of it."""
        self._steps = {**self._steps, size: cost}  # read on other threads

    def learn_ends(self, size: float, before: float, after: float) -> None:
        """A request of this size has ended."""
        seen = (*self._ends.get(size, ()), Ends(before=before, after=after))[-KEPT:]
        self._ends = {**self._ends, size: seen}

    def learn_stretch(self, foreseen: float, real: float) -> None:
        """A request ended after `real` seconds, of which the forecast said `foreseen`."""
        ratio = min(max(real / max(foreseen, 1e-6), 1 / FAR_OFF), FAR_OFF)
        self.stretch *= (ratio / self.stretch) ** NEWS

    @property
    def measured(self) -> bool:
        return bool(self._steps)

    def step(self, size: float) -> StepCost:
        """A step of this size; in proportion to the nearest that is known."""
        if not self._steps:
            return StepCost(seconds=(FIRST_GUESS * size,))
        nearest = _nearest(self._steps, size)
        known = self._steps[nearest]
        if size == nearest:
            return known
        return StepCost(seconds=tuple(s * size / nearest for s in known.seconds), share=known.share)

    def ends(self, size: float) -> Ends:
        """Encoders cost what they cost whatever the size; a VAE is in proportion."""
        if not self._ends:
            return Ends()
        nearest = _nearest(self._ends, size)
        seen = self._ends[nearest]
        before, after = middle([ends.before for ends in seen]), middle([ends.after for ends in seen])
        return Ends(before=before, after=after * size / nearest)

    def total(self, cost: Cost) -> float:
        """Seconds of a request by itself."""
        ends = self.ends(cost.per_step)
        return ends.before + cost.steps * self.step(cost.per_step).seconds[0] + ends.after


def _nearest(table: Mapping[float, Any], size: float) -> float:
    return min(table, key=lambda known: abs(math.log(known / size)))


@dataclass(kw_only=True, eq=False)
class Job:
    """What is left of a request. phase: 0 encoders, 1 steps, 2 VAE. left: seconds in phases 0 and 2, else steps."""

    request_id: str
    size: float
    steps: float
    ends: Ends
    step: StepCost
    priority: int = 0
    tenant: str = ""
    weight: float = 1.0
    phase: int = 0
    left: float = 0.0

    @property
    def kind(self) -> str | float:
        """Those alike share forwards."""
        return self.step.kind or self.size

    @property
    def left_alone(self) -> float:
        """Seconds that it still takes by itself."""
        now = self.left * self.step.seconds[0] if self.phase == 1 else self.left
        return now + sum((self.steps * self.step.seconds[0], self.ends.after)[self.phase :])

    def begin(self, phase: int) -> None:
        """Enter a phase; those with nothing in them are over at once (see `_done`)."""
        self.phase, self.left = phase, (self.ends.before, self.steps, self.ends.after)[phase]


def job_of(
    request_id: str,
    cost: Cost,
    times: Times,
    *,
    steps_left: float,
    begun: bool = False,
    priority: int = 0,
    tenant: str = "",
    weight: float = 1.0,
) -> Job:
    """What is left of a request of which so much is done."""
    job = Job(
        request_id=request_id,
        size=cost.per_step,
        steps=steps_left,
        ends=times.ends(cost.per_step),
        step=times.step(cost.per_step),
        priority=priority,
        tenant=tenant,
        weight=weight,
    )
    job.begin(1 if begun else 0)
    return job


def forecast(lanes: Sequence[list[Job]], queue: Sequence[Job], size: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds until each request ends, and until each queued one starts, of lanes that run `size` requests at most."""
    lanes, waiting, now = [list(lane) for lane in lanes], list(reversed(queue)), 0.0
    ends: dict[str, float] = {}
    starts: dict[str, float] = {}
    while True:
        _fill(lanes, waiting, size, now, starts)
        rates = [_rates(lane) for lane in lanes]
        moving = [pair for lane, own in zip(lanes, rates, strict=True) for pair in zip(lane, own, strict=True)]
        gap = min((job.left / rate for job, rate in moving), default=math.inf)
        if gap == math.inf:
            return ends, starts
        now += gap
        for job, rate in moving:
            job.left -= rate * gap
            if job.left <= 1e-9 * max(1.0, rate * gap) and _over(job):
                next(lane for lane in lanes if job in lane).remove(job)
                ends[job.request_id] = now


def _fill(lanes: list[list[Job]], waiting: list[Job], size: int, now: float, starts: dict[str, float]) -> None:
    while waiting and min(len(lane) for lane in lanes) < size:
        lane = min((lane for lane in lanes if len(lane) < size), key=lambda lane: sum(job.left_alone for job in lane))
        job = waiting.pop()
        starts[job.request_id] = now
        lane.append(job)


def _over(job: Job) -> bool:
    """Go on to the next phase; True after the last one."""
    while job.phase < 2:
        job.begin(job.phase + 1)
        if job.left > 0:
            return False
    return True


def _rates(lane: list[Job]) -> list[float]:
    """How fast each request moves: steps or seconds a second, by fair shares of the machine within each priority.

    A request that cannot use its share (one step after another, on one of several ranks) leaves the rest to others.
    """
    crowd = Counter(job.kind for job in lane if job.phase == 1)
    demands = [job.step.demand(crowd[job.kind]) if job.phase == 1 else 1.0 for job in lane]
    caps = [demand / job.step.seconds[0] if job.phase == 1 else 1.0 for demand, job in zip(demands, lane, strict=True)]
    shares, free = [0.0] * len(lane), 1.0
    for priority in sorted({job.priority for job in lane}, reverse=True):
        chosen = [place for place, job in enumerate(lane) if job.priority == priority]
        free = _share(lane, chosen, caps, shares, free)
    return [max(share, 1e-9) / demand for share, demand in zip(shares, demands, strict=True)]


def _share(lane: list[Job], chosen: list[int], caps: list[float], shares: list[float], free: float) -> float:
    """Give what is free to these, by the weights of their tenants; what is left of it."""
    open_places = list(chosen)
    while open_places and free > 1e-9:
        members = {lane[place].tenant: 0 for place in open_places}
        for place in open_places:
            members[lane[place].tenant] += 1
        weights = {place: lane[place].weight / members[lane[place].tenant] for place in open_places}
        unit = free / sum(weights.values())
        full = [place for place in open_places if shares[place] + unit * weights[place] >= caps[place] - 1e-12]
        if not full:
            for place in open_places:
                shares[place] += unit * weights[place]
            return 0.0
        for place in full:
            free -= caps[place] - shares[place]
            shares[place] = caps[place]
            open_places.remove(place)
    return max(free, 0.0)
