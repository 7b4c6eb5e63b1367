"""Where the tokens of a sequence are: how streams are cut over ranks, and in which order ranks hold them.

Every rank can compute every other rank's lengths, so no sizes travel. Nothing here knows of groups or models.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass


def length(total: int, size: int, rank: int) -> int:
    """How many of `total` items rank `rank` of `size` holds: equal parts, the first ranks one more if need be."""
    return total // size + (rank < total % size)


def start(total: int, size: int, rank: int) -> int:
    """The first of those items."""
    return rank * (total // size) + min(rank, total % size)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The tokens that one attention sees.

    streams: full lengths of the streams in the order in which the model puts them side by side (text, image). Each is
        cut by itself, so a rank holds a piece of every one, and the ranks' order is not that of the plain sequence.
    ring, ulysses: sizes of the two axes; rank = ring index x ulysses + ulysses index.
    known: tokens of each rank, where they are not what the streams would give.
    """

    streams: tuple[int, ...]
    ring: int
    ulysses: int
    known: tuple[int, ...] | None = None

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        if self.known is not None:
            return self.known
        size = self.ring * self.ulysses
        return tuple(sum(length(n, size, rank) for n in self.streams) for rank in range(size))

    def row(self, ring_rank: int) -> tuple[int, ...]:
        """Tokens of each rank of one Ulysses group."""
        return self.lengths[ring_rank * self.ulysses : (ring_rank + 1) * self.ulysses]

    @functools.cached_property
    def rows(self) -> tuple[int, ...]:
        """Tokens of each Ulysses group: what one place of the ring holds after the exchange of heads."""
        return tuple(sum(self.row(ring_rank)) for ring_rank in range(self.ring))

    @functools.cached_property
    def positions(self) -> tuple[int, ...]:
        """For the tokens in order of rank: their places in the plain sequence."""
        assert self.known is None, "where these tokens came from is not known"
        size, bases = self.ring * self.ulysses, [sum(self.streams[:i]) for i in range(len(self.streams))]
        return tuple(
            base + start(n, size, rank) + i
            for rank in range(size)
            for base, n in zip(bases, self.streams, strict=True)
            for i in range(length(n, size, rank))
        )

    @property
    def in_order(self) -> bool:
        """Whether the order of ranks is that of the plain sequence: it is for a single stream."""
        return len(self.streams) == 1 and self.known is None


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Which heads each rank of a Ulysses group computes. Key heads may be fewer (grouped queries), or uneven."""

    queries: int
    keys: int
    size: int

    @property
    def group(self) -> int:
        """Query heads that share one key head."""
        return self.queries // self.keys

    def of(self, rank: int) -> slice:
        """Query heads of a rank; none if there are fewer heads than ranks."""
        first = start(self.queries, self.size, rank)
        return slice(first, first + length(self.queries, self.size, rank))

    def keys_of(self, rank: int) -> slice:
        """Key heads that these query heads need; neighbours may both need one."""
        mine = self.of(rank)
        if mine.start == mine.stop:
            return slice(0, 0)
        return slice(mine.start // self.group, (mine.stop - 1) // self.group + 1)

    def key_of_each(self, rank: int) -> list[int]:
        """For each query head of a rank: the place of its key head among those that the rank has."""
        mine, first = self.of(rank), self.keys_of(rank).start
        return [head // self.group - first for head in range(mine.start, mine.stop)]
