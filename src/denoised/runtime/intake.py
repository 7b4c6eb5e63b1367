"""The door to the queue: what is too much is turned away before anything is queued. Thread-safe; no clock."""

from __future__ import annotations

import threading

from denoised.errors import QueueFullError

# Seconds that asking again is worth waiting for, at least and at most.
SOONEST, LATEST = 1.0, 600.0


class Intake:
    """Counts requests from their submission to their output.

    Args:
        max_len, max_seconds: of what waits; seconds are predicted, None: any.
        capacity: requests that run at once.
    """

    def __init__(self, max_len: int, max_seconds: float | None, capacity: int) -> None:
        self._max_len, self._max_seconds, self._capacity = max_len, max_seconds, capacity
        self._queued: dict[str, float] = {}
        self._inside: set[str] = set()
        self._lock = threading.Lock()
        self.next_start = SOONEST
        """Predicted seconds until the next request starts; the client keeps it up to date."""

    def enter(self, request_id: str, seconds: float, *, bounded: bool) -> None:
        """A request that is predicted to take so long comes in. `bounded` False: it does whatever waits.

        Raises:
            QueueFullError: too much is waiting; it did not come in.
        """
        with self._lock:
            if bounded:
                self._refuse(seconds)
            self._inside.add(request_id)
            self._queued[request_id] = seconds

    def _refuse(self, seconds: float) -> None:
        again = min(max(self.next_start, SOONEST), LATEST)
        waiting = len(self._inside) - self._capacity
        if waiting >= self._max_len:
            raise QueueFullError(
                f"max_queue_len={self._max_len}: so many requests wait already; ask again in {again:.0f} s.",
                retry_after=again,
            )
        ahead = self.queued_seconds
        if self._max_seconds is not None and self._queued and waiting >= 0 and ahead + seconds > self._max_seconds:
            again = min(max(ahead + seconds - self._max_seconds, SOONEST), LATEST)
            raise QueueFullError(
                f"max_queue_seconds={self._max_seconds:g}: {ahead:.0f} s of work wait already; ask again in "
                f"{again:.0f} s.",
                retry_after=again,
            )

    def start(self, request_id: str) -> None:
        """It waits no more."""
        with self._lock:
            self._queued.pop(request_id, None)

    def leave(self, request_id: str) -> None:
        """It has its output."""
        with self._lock:
            self._queued.pop(request_id, None)
            self._inside.discard(request_id)

    @property
    def queued_seconds(self) -> float:
        return sum(self._queued.values())
