"""Counting on a rank what it does, and when to tell the client of it."""

from __future__ import annotations

import bisect
import time
from collections import Counter, deque
from collections.abc import Sequence

from denoised.features import guidance
from denoised.runtime import memory
from denoised.runtime.dispatch import Dispatch
from denoised.runtime.protocol import Ticked
from denoised.runtime.stats import Work

# Seconds between words to the client about how it goes, and from which on a tick is announced before it runs.
WORD, LONG = 0.25, 2.0
# So many ticks are counted that a request may have waited for.
MOST_TICKS = 1000


class RankMeter:
    """Sums since the ranks started. Rank 0 tells them; what it says of the others is what they told it."""

    def __init__(self, dispatch: Dispatch, world_size: int) -> None:
        self._dispatch, self._told, self._news = dispatch, 0.0, False
        self.counts: Counter[str] = Counter()
        self._seconds, self._longest = 0.0, 0.0
        self._stages: dict[str, float] = {}
        self._busy = [0.0] * world_size
        self.loras, self.lora_mb = 0, 0.0
        self._starts: deque[float] = deque(maxlen=MOST_TICKS)

    def begins(self) -> None:
        """A tick that has work."""
        self._starts.append(time.time())

    def ticks_since(self, came: float) -> int:
        """How many ticks with work began since then, by `time.time()`; at most `MOST_TICKS`."""
        return len(self._starts) - bisect.bisect_right(self._starts, came)

    def tick(self, seconds: float, *, ran: Sequence[float], worked: Sequence[float]) -> None:
        """A tick that had work: by rank, seconds in which it ran calls, and in which it worked at all."""
        self._news = True
        self.counts["ticks_total"] += 1
        self._seconds += seconds
        self._longest = max(self._longest, seconds)
        self._busy = [sum(pair) for pair in zip(self._busy, worked, strict=True)]
        self._dispatch.measured(seconds, max(ran))

    def stage(self, name: str, seconds: float) -> None:
        self._stages[str(name)] = self._stages.get(str(name), 0.0) + seconds

    def noted(self) -> None:
        """Something changed that the client should hear of, even if nothing runs."""
        self._news = True

    def rows(self, work: Sequence[guidance.Work]) -> None:
        """What the ranks did for a request that is over."""
        self.counts["rows_total"] += sum(did.rows for did in work)
        self.counts["rows_joined_total"] += sum(did.rows_joined for did in work)

    def word(self, *, idle: bool) -> list[Ticked]:
        """How it goes, if it is time to say so: now and then, before what may take long, and when all is done."""
        turn, now = self._dispatch.turn, time.monotonic()
        surprise = not turn.known or turn.seconds > LONG or (idle and self._news)
        if not surprise and (now - self._told < WORD or not self._news):
            return []
        self._told, self._news = now, False
        expected = turn.seconds if turn.known else None
        costs, used = self._dispatch.costs(), memory.now_mb()
        return [
            Ticked(
                work=self._snapshot(),
                costs=costs,
                expected=expected,
                memory_mb=used,
                loras=self.loras,
                lora_mb=self.lora_mb,
            )
        ]

    def _snapshot(self) -> Work:
        return Work(
            **self.counts,
            waits_total=self._dispatch.num_waits,
            tick_seconds_total=self._seconds,
            longest_tick=self._longest,
            stage_seconds_total=dict(self._stages),
            busy_seconds_total=tuple(self._busy),
        )
