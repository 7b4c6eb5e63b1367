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
    for counts in open_counts():
        counts[name] += amount


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Everything counted on this thread inside the block."""
    counts: Counter[str] = Counter()
    outer = open_counts()
    _local.open = (*outer, counts)
    try:
        yield counts
    finally:
        _local.open = outer


def open_counts() -> tuple[Counter[str], ...]:
    """What is being counted on this thread, for `counting` on another."""
    counts: tuple[Counter[str], ...] = getattr(_local, "open", ())
    return counts


@contextlib.contextmanager
def counting(counts: tuple[Counter[str], ...]) -> Iterator[None]:
    """Count what this thread does in the block into another's `open_counts`, which waits meanwhile."""
    outer = open_counts()
    _local.open = counts
    try:
        yield
    finally:
        _local.open = outer
