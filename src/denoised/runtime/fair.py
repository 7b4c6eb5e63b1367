"""Weighted fairness: whose turn it is, by what each has had, in seconds of service over weight.

Knows names and numbers only; queue and ranks both use it.
"""

from __future__ import annotations


class FairClock:
    """A virtual time for each name: seconds it has had, over its weight. The least goes next.

    Who comes in starts at the present, the least time of those who are in: having been away saves nothing up, and is
    not held against anybody. Who leaves and comes back is not before where it left.
    """

    def __init__(self) -> None:
        self._times: dict[str, float] = {}
        self._in: dict[str, int] = {}
        self._present = 0.0

    def enter(self, name: str) -> None:
        """`name` has something to do; once for each thing."""
        self._see()
        if name not in self._in:
            self._times[name] = max(self._times.get(name, 0.0), self._present)
        self._in[name] = self._in.get(name, 0) + 1

    def leave(self, name: str) -> None:
        """One thing less."""
        self._see()
        self._in[name] -= 1
        if not self._in[name]:
            del self._in[name]
        self._times = {n: t for n, t in self._times.items() if n in self._in or t > self._present}

    def charge(self, name: str, seconds: float, weight: float = 1.0) -> None:
        """`name` has had so much; negative: a prediction was too high."""
        if name in self._times:
            self._times[name] += seconds / weight
            self._see()

    def time(self, name: str) -> float:
        return self._times.get(name, self._present)

    def _see(self) -> None:
        self._present = max(self._present, min((self._times[n] for n in self._in), default=self._present))
