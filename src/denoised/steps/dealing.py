"""Which rank runs which rows, and which rows share a forward.

Every rank computes the same answers from the same calls; nothing here knows of processes or groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from denoised.steps.forward import Call
from denoised.steps.rows import Piece, RowRules, batch_size, cost, signature

Key = tuple[str, int, int]

# A rank that has so much more to do, in rows like the one that is dealt, is as good as the one that has least.
AS_GOOD = 0.05


@dataclass(kw_only=True)
class Placement:
    """Which rank of the cfg axis a row runs on: that with the least work. A call stays whole unless it is more than a
    rank's fair share.

    sticky: a row lives on its rank for the life of its request, for what caches remember of it is there. Otherwise
        rows are dealt anew in each tick, the longest first, around what else ranks have to do in it; a row stays where
        it was if that is as good.
    """

    num_ranks: int
    sticky: bool = True
    _rank: dict[Key, int] = field(default_factory=dict)
    _cost: dict[Key, float] = field(default_factory=dict)
    _bound: set[str] = field(default_factory=set)
    _before: dict[Key, int] = field(default_factory=dict)
    _taken: Sequence[float] = ()

    def deal(
        self,
        calls: Sequence[Call],
        splittable: Callable[[Call], bool],
        price: Callable[[Call], float] = cost,
        taken: Sequence[float] = (),
    ) -> list[tuple[int, Piece]]:
        """Rank and piece for all rows of the calls of a tick. A call that cannot be split stays whole.

        Args:
            price: of one row of a call.
            taken: what each rank has to do besides, in the same unit; it does not move rows that live on a rank.
        """
        order = list(calls) if self.sticky else sorted(calls, key=lambda call: -price(call))
        if not self.sticky:
            self._start_anew(taken)
        total = sum(self._taken) + sum(price(call) * batch_size(call) for call in calls)
        pieces = {}
        for call in order:
            own = price(call)
            whole = own * batch_size(call) * self.num_ranks <= total
            pieces[call] = self._pieces(call, own, whole=whole, splittable=splittable)
        return [item for call in calls for item in pieces[call]]

    def _start_anew(self, taken: Sequence[float]) -> None:
        """Only calls that are bound to a rank stay where they are."""
        self._before |= self._rank
        self._rank = {key: rank for key, rank in self._rank.items() if key[0] in self._bound}
        self._cost, self._taken = {}, taken

    def homes(self, call: Call) -> tuple[int | None, ...]:
        """The rank of each row, None where it may be any."""
        if not self.sticky and call.task_id not in self._bound:
            return (None,) * batch_size(call)
        return tuple(self._rank.get((call.task_id, call.branch, row)) for row in range(batch_size(call)))

    def _pieces(
        self, call: Call, price: float, *, whole: bool, splittable: Callable[[Call], bool]
    ) -> list[tuple[int, Piece]]:
        batch = batch_size(call)
        keys = [(call.task_id, call.branch, row) for row in range(batch)]
        if call.stateful:
            return [(self._only_home(keys, price), Piece(call=call, rows=tuple(range(batch)), batch=batch))]
        divisible = not whole and splittable(call)  # asking may cost a forward, so only where it matters
        for key in keys:
            if key not in self._rank:
                self._place(key, None if divisible else self._rank.get(keys[0]), price)
        homes = sorted({self._rank[key] for key in keys})
        if not divisible and not whole:
            homes = [self._rank[keys[0]]]
        rows = {home: tuple(row for row, key in enumerate(keys) if self._rank[key] == home) for home in homes}
        if len(homes) == 1:
            rows[homes[0]] = tuple(range(batch))
        return [(home, Piece(call=call, rows=rows[home], batch=batch)) for home in homes]

    def _only_home(self, keys: list[Key], work: float) -> int:
        """Where the request's first row is: a call that is given a store runs where the store was filled."""
        self._bound.add(keys[0][0])
        home = next((rank for key, rank in self._rank.items() if key[0] == keys[0][0]), None)
        for key in keys:
            self._place(key, home, work)
            home = self._rank[key]
        return self._rank[keys[0]]

    def _place(self, key: Key, home: int | None, work: float) -> None:
        self._rank[key] = self._best(key, work) if home is None else home
        self._cost[key] = work

    def _best(self, key: Key, work: float) -> int:
        loads = [self._load(rank) for rank in range(self.num_ranks)]
        homes = [rank for k, rank in (self._before | self._rank).items() if k[0] == key[0]]
        least = min(range(self.num_ranks), key=lambda rank: (loads[rank], homes.count(rank)))
        before = self._before.get(key, least)
        return before if loads[before] <= loads[least] + AS_GOOD * work else least

    def _load(self, rank: int) -> float:
        taken = self._taken[rank] if self._taken else 0.0
        return taken + sum(cost for key, cost in self._cost.items() if self._rank[key] == rank)

    def release(self, task_id: str) -> None:
        """Forget the rows of a finished request."""
        self._rank = {key: rank for key, rank in self._rank.items() if key[0] != task_id}
        self._cost = {key: cost for key, cost in self._cost.items() if key[0] != task_id}
        self._before = {key: rank for key, rank in self._before.items() if key[0] != task_id}
        self._bound.discard(task_id)


def group(
    pieces: Sequence[Piece],
    rules: Callable[[Call], RowRules],
    may_join: Callable[[Piece, Piece], bool],
    max_rows: int,
) -> list[list[Piece]]:
    """Pieces that share a forward, at most `max_rows` rows of it.

    Rows of one request alone are never joined: run in turn they give the bytes of the plain pipeline.
    """
    groups: list[tuple[Any, list[Piece]]] = []
    for piece in pieces:
        sign = signature(piece.call, rules(piece.call))
        fits = (g for s, g in groups if s == sign and _rows(g) + len(piece.rows) <= max_rows and may_join(g[0], piece))
        home = next(fits, None)
        if home is None:
            groups.append((sign, [piece]))
        else:
            home.append(piece)
    return [part for _, g in groups for part in ([g] if _num_tasks(g) > 1 else [[piece] for piece in g])]


def _rows(pieces: Sequence[Piece]) -> int:
    return sum(len(piece.rows) for piece in pieces)


def _num_tasks(pieces: Sequence[Piece]) -> int:
    return len({piece.call.task_id for piece in pieces})


def course(call: Call) -> str:
    """All of a call that may decide which blocks its forward runs: which arguments it has, switches, and lists of
    numbers, such as layers to leave out. Sizes of pictures and texts decide nothing there, nor do tensors."""
    return repr([(name, _decisive(value)) for name, value in sorted(call.named_arguments().items())])


def _decisive(value: Any) -> Any:
    if value is None or isinstance(value, bool | str):
        return value
    numbers = type(value) in (list, tuple) and all(isinstance(number, int) for number in value)
    return tuple(value) if numbers else type(value).__name__
