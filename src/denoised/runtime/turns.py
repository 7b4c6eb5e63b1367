"""Whose rows run in the next tick. The same on every rank, from what all ranks know: nothing of it travels.

One request leads: of the highest priority, the one whose tenant, and which itself, has had the least. Others come
along where that is predicted to be quicker than taking turns: rows of one kind that share a forward, and rows for
ranks that would be idle. All the rest keep their pending calls and wait.

Encoder and VAE calls run by themselves, one request at a time; those that are shorter than a step go first, within
what one step takes, so that requests that came together meet in their first step.

Pure Python: no torch, no clock. Seconds come in as measured.

The bound, which tests/test_turns.py shows by simulation: of k requests of equal weight and priority in flight, one
that takes s seconds alone is done after at most k * s seconds and k of the longest ticks.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from denoised.request import Service
from denoised.runtime.cost_model import GAIN, CostModel, Kind, Load
from denoised.runtime.fair import FairClock
from denoised.runtime.protocol import StepCost

# Rows of another kind that fill idle ranks may make a tick this much longer than the leader's own.
STRETCH = 2.0
# How many requests alike costs are told for: what an engine has in flight, as a rule.
CROWD = 8


@dataclass(frozen=True, kw_only=True)
class Part:
    """One pending call: what it shares forwards with, and the rank of each row, None where it is not placed yet."""

    kind: Kind
    size: int
    homes: tuple[int | None, ...]


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a request asks for next. `whole`: an encoder or VAE call, which every rank runs."""

    request_id: str
    parts: tuple[Part, ...]
    whole: bool = False

    @property
    def elements(self) -> int:
        return sum(part.size * len(part.homes) for part in self.parts)


@dataclass(kw_only=True)
class _Seat:
    """A request in flight."""

    number: int
    service: Service
    steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The choice: who runs, what each rank runs, and what it is predicted to take. `known`: all of it was measured
    before, so that a tick that takes far longer is a hang."""

    wishes: tuple[Wish, ...] = ()
    loads: tuple[tuple[Load, ...], ...] = ()
    seconds: float = 0.0
    known: bool = True

    @property
    def request_ids(self) -> frozenset[str]:
        return frozenset(wish.request_id for wish in self.wishes)


@dataclass(kw_only=True)
class Turns:
    """Chooses, and learns from what the choice took.

    join: rows of several requests may share a forward. max_rows: of one forward. max_elements: of all rows that run
    together on a rank, for its memory; a request alone is never held back by it.
    """

    num_ranks: int
    join: bool
    max_rows: int
    max_elements: float = float("inf")
    costs: CostModel = field(default_factory=CostModel)
    _seats: dict[str, _Seat] = field(default_factory=dict)
    _tenants: FairClock = field(default_factory=FairClock)
    _requests: dict[str, FairClock] = field(default_factory=dict)
    _count: int = 0
    _solo: dict[str, float] = field(default_factory=dict)

    def enter(self, request_id: str, service: Service) -> None:
        """A request was admitted."""
        self._seats[request_id] = _Seat(number=self._count, service=service)
        self._count += 1
        self._tenants.enter(service.tenant)
        self._requests.setdefault(service.tenant, FairClock()).enter(request_id)

    def leave(self, request_id: str) -> None:
        """A request ended."""
        seat = self._seats.pop(request_id, None)
        if seat is None:
            return
        tenant = seat.service.tenant
        self._tenants.leave(tenant)
        self._requests[tenant].leave(request_id)
        if not any(other.service.tenant == tenant for other in self._seats.values()):
            del self._requests[tenant]

    def choose(self, wishes: Sequence[Wish]) -> Turn:
        """Who runs now, of the requests that have something to run."""
        if not wishes:
            return Turn()
        solo = {wish.request_id: self._turn([wish]) for wish in wishes}
        self._solo = {request_id: turn.seconds for request_id, turn in solo.items()}
        steps = [solo[wish.request_id] for wish in wishes if not wish.whole]
        step = max((turn.seconds if turn.known else math.inf for turn in steps), default=0.0)
        order = sorted(wishes, key=lambda wish: self._rank(wish, step))
        turn = self._turn(order[:1])
        if order[0].whole:
            return turn
        longest = STRETCH * turn.seconds
        for wish in order[1:]:
            if not wish.whole:
                turn = self._with(turn, wish, longest)
        return turn

    def ran(self, turn: Turn, loads: Sequence[Sequence[Load]], busy: Sequence[float]) -> None:
        """What a turn really was on each rank, and the seconds that took; each request is charged its part."""
        for own, seconds in zip(loads, busy, strict=True):
            if own:
                self.costs.learn(own, seconds)
        total = sum(busy)
        weights = [self._solo[wish.request_id] for wish in turn.wishes]
        for wish, weight in zip(turn.wishes, weights, strict=True):
            self._charge(wish.request_id, total * weight / max(sum(weights), 1e-12))

    def step_cost(self, wish: Wish, extra: float = 1.0) -> StepCost:
        """What a step of such requests takes, alone and beside others like it. Ticks take `extra` times their work."""
        alone = self._crowd(wish, 1)
        crowds = [min(self._crowd(wish, count).seconds, count * alone.seconds) for count in range(1, CROWD + 1)]
        used = sum(self.costs.rank_seconds(own) for own in alone.loads)
        share = used / max(self.num_ranks * alone.seconds, 1e-12)
        kinds = repr(sorted({repr(part.kind) for part in wish.parts})).encode()
        return StepCost(
            seconds=tuple(extra * seconds for seconds in crowds), share=share, kind=f"{zlib.crc32(kinds):08x}"
        )

    def _crowd(self, wish: Wish, count: int) -> Turn:
        """A tick with so many requests like this one, on the ranks with the least to do."""
        return self._turn([_unplaced(wish, number) for number in range(count)])

    # ---- the choice

    def _rank(self, wish: Wish, step: float) -> tuple[float, ...]:
        """What requests are sorted by; a call shorter than a step counts as having had a step less."""
        seat = self._seats[wish.request_id]
        tenant = seat.service.tenant
        ahead = step if wish.whole and self._solo[wish.request_id] <= step else 0.0
        own = self._requests[tenant].time(wish.request_id) - ahead * self.num_ranks
        return (
            -seat.service.priority,
            self._tenants.time(tenant) - ahead * self.num_ranks / seat.service.weight,
            own,
            seat.number,
        )

    def _with(self, turn: Turn, wish: Wish, longest: float) -> Turn:
        """With one more request, if that is quicker than running it by itself."""
        more = self._turn([*turn.wishes, wish])
        if more.seconds - turn.seconds >= GAIN * self._solo[wish.request_id] or not self._fits(more):
            return turn
        same = {part.kind for part in wish.parts} <= {part.kind for other in turn.wishes for part in other.parts}
        return more if same or more.seconds <= longest else turn

    def _fits(self, turn: Turn) -> bool:
        return all(
            sum(load.rows * load.size for load in loads) <= self.max_elements
            and all(load.requests == 1 or load.rows <= self.max_rows for load in loads)
            for loads in turn.loads
        )

    def _turn(self, wishes: Sequence[Wish]) -> Turn:
        loads = self._loads(wishes)
        seconds = max(self.costs.rank_seconds(own) for own in loads)
        known = all(self.costs.knows(load) for own in loads for load in own)
        return Turn(wishes=tuple(wishes), loads=tuple(map(tuple, loads)), seconds=seconds, known=known)

    def _loads(self, wishes: Sequence[Wish]) -> list[list[Load]]:
        """What each rank would run. Rows without a place go where the least is."""
        ranks: list[dict[tuple[Kind, str], Load]] = [{} for _ in range(self.num_ranks)]
        for wish in wishes:
            for part in wish.parts:
                for home in range(self.num_ranks) if wish.whole else part.homes:
                    place = home if home is not None else _least(ranks)
                    key = (part.kind, wish.request_id)
                    rows = ranks[place][key].rows + 1 if key in ranks[place] else 1
                    ranks[place][key] = Load(kind=part.kind, requests=1, rows=rows, size=part.size)
        return [self.joined(list(own.items())) for own in ranks]

    def joined(self, own: Sequence[tuple[tuple[Kind, str], Load]]) -> list[Load]:
        """Loads of one rank, by kind and request, as its forwards are: of one kind together, if rows may be joined."""
        if not self.join:
            return [load for _, load in own]
        kinds: dict[Kind, list[Load]] = {}
        for (kind, _), load in own:
            kinds.setdefault(kind, []).append(load)
        return [
            Load(kind=kind, requests=len(loads), rows=sum(load.rows for load in loads), size=loads[0].size)
            for kind, loads in kinds.items()
        ]

    def _charge(self, request_id: str, seconds: float) -> None:
        seat = self._seats.get(request_id)
        if seat is not None:
            self._requests[seat.service.tenant].charge(request_id, seconds)
            self._tenants.charge(seat.service.tenant, seconds, seat.service.weight)


def _least(ranks: Sequence[dict[tuple[Kind, str], Load]]) -> int:
    work = [sum(load.rows * load.size for load in own.values()) for own in ranks]
    return work.index(min(work))


def _unplaced(wish: Wish, number: int) -> Wish:
    parts = tuple(Part(kind=p.kind, size=p.size, homes=(None,) * len(p.homes)) for p in wish.parts)
    return Wish(request_id=f"{wish.request_id}+{number}", parts=parts, whole=wish.whole)
