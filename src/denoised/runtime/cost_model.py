"""How long ranks take for what a tick gives them: measured, and guessed where nothing was measured yet.

A rank runs, in one tick, some rows of some requests of one kind (equal signature, so that they share a forward).
Guesses start from elements x rows, and lean towards trying: how much is gained by joining is learned by joining.
Pure Python, no clock; equal measurements give equal answers, so that all ranks choose alike.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

Kind = Hashable

# Seconds of an element before anything was measured: only compared with itself.
FIRST_GUESS = 1e-6
# What a row more costs, of one alone, until it is measured: below GAIN, so that it is tried.
HOPE = 0.9
# Joining must save this much of the time, or rows take turns: short ticks serve everybody better.
GAIN = 0.97
# A joined time counts against joining after so many measurements; it is tried anew after so many of its kind.
TRUST, TRY_AGAIN = 3, 400
KEPT = 7
# What runs for the first time warms up caches and memory: until trusted it counts as at most so many times a guess.
FIRST_RUN = 2.0
# The kinds that were met first are forgotten.
MAX_KINDS = 1024


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one rank runs of one kind: `rows` of so many `requests`, of `size` elements each. Rows of one request run
    in turn, rows of several are joined."""

    kind: Kind
    requests: int
    rows: int
    size: int

    @property
    def forwards(self) -> int:
        return self.rows if self.requests == 1 else 1


class CostModel:
    """Seconds of loads. `num_stages`: pipeline stages, in which forwards of one tick overlap."""

    def __init__(self, num_stages: int = 1) -> None:
        self._num_stages = num_stages
        self._seen: dict[Kind, dict[tuple[int, int], deque[float]]] = {}
        self._sizes: dict[Kind, int] = {}
        self._age: dict[Kind, int] = {}

    def knows(self, load: Load) -> bool:
        """Whether this kind of work was ever measured."""
        return load.kind in self._seen

    def rank_seconds(self, loads: Sequence[Load]) -> float:
        """One rank's tick: loads in turn, overlapping where there are stages."""
        if self._num_stages == 1:
            return sum(self.seconds(load) for load in loads)
        slots = [(self.seconds(load) / (load.forwards + self._num_stages - 1), load.forwards) for load in loads]
        longest = max((slot for slot, _ in slots), default=0.0)
        return sum(slot * forwards for slot, forwards in slots) + (self._num_stages - 1) * longest

    def seconds(self, load: Load) -> float:
        """One load by itself."""
        seen = self._seen.get(load.kind, {}).get((load.requests, load.rows), ())
        if len(seen) >= TRUST:
            return middle(seen)
        if seen and load.requests == 1:
            others = self._per_element(load, default=math.inf)
            return min(middle(seen), FIRST_RUN * others * load.size * load.rows)
        guess = self._alone(load, load.rows) if load.requests == 1 else self._joined(load)
        return min(middle(seen), guess) if seen else guess

    def learn(self, loads: Sequence[Load], seconds: float) -> None:
        """One rank took so long for all of these; each takes its part of what is not as predicted."""
        predicted = [self.seconds(load) for load in loads]
        scale = seconds / max(self.rank_seconds(loads), 1e-9)
        for load, own in zip(loads, predicted, strict=True):
            self._keep(load, own * scale)

    def _keep(self, load: Load, seconds: float) -> None:
        table = self._seen.setdefault(load.kind, {})
        if len(self._seen) > MAX_KINDS:
            self._forget(next(iter(self._seen)))
        self._sizes[load.kind] = load.size
        self._age[load.kind] = self._age.get(load.kind, 0) + 1
        if self._age[load.kind] % TRY_AGAIN == 0:
            for key in [key for key in table if key[0] > 1]:
                del table[key]
        table.setdefault((load.requests, load.rows), deque(maxlen=KEPT)).append(seconds)

    def _forget(self, kind: Kind) -> None:
        for each in (self._seen, self._sizes, self._age):
            each.pop(kind, None)

    def _alone(self, load: Load, rows: int) -> float:
        """So many rows of one request: like other numbers of rows of its kind, else like other kinds, by elements."""
        table = self._seen.get(load.kind, {})
        known = {n: middle(seen) for (requests, n), seen in table.items() if requests == 1}
        if known:
            nearest = min(known, key=lambda n: (abs(n - rows), n))
            return known[nearest] * rows / nearest
        if table:  # measured joined only: joined again a few times, then tried alone
            (_, n), seen = min(table.items(), key=lambda item: item[0])
            return middle(seen) * rows / n * (HOPE if sum(map(len, table.values())) >= TRUST else 1 / HOPE)
        return self._per_element(load) * load.size * rows

    def _per_element(self, load: Load, default: float = FIRST_GUESS) -> float:
        """Of the kind that is nearest in size; kinds of another sort (an encoder) say nothing of this one."""
        sort = load.kind[0] if isinstance(load.kind, tuple) else None
        near: list[tuple[float, float]] = []
        for kind, size in self._sizes.items():
            if kind != load.kind and (kind[0] if isinstance(kind, tuple) else None) == sort:
                (_, rows), seen = min(self._seen[kind].items(), key=lambda item: item[0])
                near.append((abs(size - load.size), middle(seen) / (rows * size)))
        return min(near)[1] if near else default

    def _joined(self, load: Load) -> float:
        """Rows of several requests: on from the nearest number that was measured."""
        one = self._alone(load, 1)
        table = self._seen.get(load.kind, {})
        known = {n: middle(seen) for (requests, n), seen in table.items() if requests > 1 and len(seen) >= TRUST}
        if not known:
            return one * (1 + HOPE * (load.rows - 1))
        nearest = min(known, key=lambda n: (abs(n - load.rows), n))
        slope = (known[nearest] - one) / max(nearest - 1, 1)
        return max(one, known[nearest] + (load.rows - nearest) * min(max(slope, 0.0), one))


def middle(seen: Sequence[float]) -> float:
    """The lower median: a first run that had to warm up, or was disturbed, does not count for long."""
    return sorted(seen)[(len(seen) - 1) // 2]
