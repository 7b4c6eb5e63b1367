"""Whose rows run in the next tick. The same on every rank, from what all ranks know: nothing of it travels.

One request leads: of the highest priority, the one whose tenant, and which itself, has had the least. Others come
along where that is predicted to be quicker than taking turns: rows of one kind that share a forward, and rows for
ranks that would be idle. All the rest keep their pending calls and wait.

Encoder and VAE calls that every rank runs have a tick of their own, one request at a time; those that one rank runs
share it with others' calls and rows on the other ranks. Those that are shorter than a step go first, within what one
step takes, so that requests that came together meet in their first step.

Pure Python: no torch, no clock. Seconds come in as measured.

The bound, which tests/test_turns.py shows by simulation: of k requests of equal weight and priority in flight, one
that takes s seconds alone is done after at most k * s seconds and k of the longest ticks.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from denoised.request import Service
from denoised.runtime.cost_model import GAIN, CostModel, Kind, Load
from denoised.runtime.fair import FairClock
from denoised.runtime.protocol import StepCost

# Rows of another kind that fill idle ranks may make a tick this much longer than the leader's own.
STRETCH = 2.0
# Seconds that a second of earlier work counts for, when ranks are compared: of equal ones the next is another one.
FAVOUR = 1e-9
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
    """What a request asks for next. `whole`: an encoder or VAE call, which one rank runs, or `everywhere`: each."""

    request_id: str
    parts: tuple[Part, ...]
    whole: bool = False
    everywhere: bool = True

    @property
    def elements(self) -> int:
        return sum(part.size * len(part.homes) for part in self.parts)


@dataclass(kw_only=True)
class _Desk:
    """What one rank would run, by kind and request; about the seconds of it."""

    loads: dict[tuple[Kind, str], Load] = field(default_factory=dict)
    seconds: float = 0.0

    def take(self, wish: Wish, part: Part, price: float) -> None:
        key = (part.kind, wish.request_id)
        rows = self.loads[key].rows + 1 if key in self.loads else 1
        self.loads[key] = Load(kind=part.kind, requests=1, rows=rows, size=part.size)
        self.seconds += price


@dataclass(kw_only=True)
class _Seat:
    """A request in flight."""

    number: int
    service: Service
    steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The choice: who runs, what each rank runs, and what it is predicted to take. `places`: the ranks of encoder and
    VAE calls that only one runs, by request. `known`: all of it was measured before, so that a tick that takes far
    longer is a hang."""

    wishes: tuple[Wish, ...] = ()
    loads: tuple[tuple[Load, ...], ...] = ()
    places: tuple[tuple[str, int], ...] = ()
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
    _had: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._had = [0.0] * self.num_ranks

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
        if order[0].whole and order[0].everywhere:
            return turn
        longest = STRETCH * turn.seconds
        for wish in order[1:]:
            if not (wish.whole and wish.everywhere):
                turn = self._with(turn, wish, longest)
        return turn

    def ran(self, turn: Turn, loads: Sequence[Sequence[Load]], busy: Sequence[float]) -> None:
        """What a turn really was on each rank, and the seconds that took; each request is charged its part."""
        for own, seconds in zip(loads, busy, strict=True):
            if own:
                self.costs.learn(own, seconds)
        self._had = [had + seconds for had, seconds in zip(self._had, busy, strict=True)]
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
        desks = [_Desk(seconds=FAVOUR * had) for had in self._had]
        places = tuple(self._dealt(desks, wishes))
        loads = [self.joined(list(desk.loads.items())) for desk in desks]
        seconds = max(self.costs.rank_seconds(own) for own in loads)
        known = all(self.costs.knows(load) for own in loads for load in own)
        return Turn(wishes=tuple(wishes), loads=tuple(map(tuple, loads)), places=places, seconds=seconds, known=known)

    def _dealt(self, desks: list[_Desk], wishes: Sequence[Wish]) -> Iterator[tuple[str, int]]:
        """Give ranks what they would run: what has no place goes where the least is, the longest first, as
        `Placement` does it; the ranks of calls that one of them runs whole."""
        prices = self.prices(wishes)
        parts = [(prices[part.kind], wish, part) for wish in wishes for part in wish.parts]
        for price, wish, part in sorted(parts, key=lambda item: (not item[1].whole, -item[0])):
            if wish.whole and wish.everywhere:
                for desk in desks:
                    desk.take(wish, part, price)
                continue
            for home in part.homes:
                place = min(range(self.num_ranks), key=lambda rank: desks[rank].seconds) if home is None else home
                desks[place].take(wish, part, price)
                if wish.whole:
                    yield wish.request_id, place

    def prices(self, wishes: Sequence[Wish]) -> dict[Kind, float]:
        """Seconds of one row of each kind, or of a whole call, if these run together: joined rows take less each."""
        parts = [(wish.request_id, part) for wish in wishes for part in wish.parts]
        found: dict[Kind, float] = {}
        for kind in {part.kind: None for _, part in parts}:
            alike = [(request_id, part) for request_id, part in parts if part.kind == kind]
            requests = len({request_id for request_id, _ in alike})
            rows = max(1, sum(len(part.homes) for _, part in alike) // self.num_ranks)
            together = min(requests, rows) if self.join else 1
            load = Load(kind=kind, requests=together, rows=rows, size=alike[0][1].size)
            found[kind] = self.costs.seconds(load) / rows
        return found

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


def _unplaced(wish: Wish, number: int) -> Wish:
    parts = tuple(Part(kind=p.kind, size=p.size, homes=(None,) * len(p.homes)) for p in wish.parts)
    return Wish(request_id=f"{wish.request_id}+{number}", parts=parts, whole=wish.whole, everywhere=wish.everywhere)
