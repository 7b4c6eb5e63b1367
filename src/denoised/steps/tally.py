"""Counting what features do inside a forward, where they do it: proof for receipts and tests that a feature acted.

`count()` is called by whoever does the work; `counted()` collects around a forward. Counts never change a result.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator

_local = threading.local()


def count(name: str, amount: int = 1) -> None:
    """Add to what is being counted on this thread; without a `counted()` around it, nothing happens."""
    for counts in getattr(_local, "open", ()):
        counts[name] += amount


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Everything counted on this thread inside the block."""
    counts: Counter[str] = Counter()
    outer = getattr(_local, "open", ())
    _local.open = (*outer, counts)
    try:
        yield counts
    finally:
        _local.open = outer
