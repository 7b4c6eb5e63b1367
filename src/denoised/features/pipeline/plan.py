"""What is known of a wave of rows before it runs: whose turn it is when, where rows pause, and all that is sent."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from denoised.features.pipeline.layout import Record, Shape, outlines
from denoised.features.pipeline.order import Part, order


class Key(NamedTuple):
    """The `leaf`-th tensor in the output of the `event`-th call of a block in a row."""

    row: int
    event: int
    leaf: int


class Letter(NamedTuple):
    """A tensor from stage to stage."""

    key: Key
    source: int
    to: int
    shape: Shape


@dataclass(frozen=True, kw_only=True)
class Way:
    """How forwards of one signature go through the stages."""

    record: Record
    parts: tuple[Part, ...]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The first call of a block in each part, and the end of all."""
        return tuple(itertools.accumulate((part.length for part in self.parts), initial=0))

    def pauses(self, stage: int) -> frozenset[int]:
        """Calls before which the row waits for its next turn on this stage: the first of others that is needed for
        the turn, or else the turn's own first. After the last turn, what is needed for the end.
        """
        before = [0, *(self.starts[part + 1] for part in self.own(stage))]
        firsts = [*(self.starts[part] for part in self.own(stage)), len(self.record.events)]
        found = {self._first_needed(stage, a, b) for a, b in zip(before, firsts, strict=True)}
        return frozenset(found - {len(self.record.events)} - ({0} if self.begins(stage) else set()))

    @cached_property
    def letters(self) -> tuple[tuple[Letter, ...], ...]:
        """What each part sends, with 0 for the row."""
        spans = zip(self.parts, itertools.pairwise(self.starts), strict=True)
        return tuple(tuple(self._written(part.stage, range(*span))) for part, span in spans)

    def _written(self, stage: int, numbers: Iterable[int]) -> Iterator[Letter]:
        for number in numbers:
            event = self.record.events[number]
            for leaf, (shape, stages) in enumerate(zip(outlines(event.output), event.stages, strict=True)):
                yield from (Letter(Key(0, number, leaf), stage, to, shape) for to in sorted(stages))

    def own(self, stage: int) -> list[int]:
        """The parts that run there."""
        return [number for number, part in enumerate(self.parts) if part.stage == stage]

    def begins(self, stage: int) -> bool:
        """Whether the row's first block is there: then its first turn is also its beginning."""
        return bool(self.parts) and self.parts[0].stage == stage

    def ends(self, stage: int) -> bool:
        """Whether the row needs something of others after its last turn there."""
        own = self.own(stage)
        last = self.starts[own[-1] + 1] if own else 0
        return self._first_needed(stage, last, len(self.record.events)) < len(self.record.events)

    def _first_needed(self, stage: int, start: int, end: int) -> int:
        return next((n for n in range(start, end) if self.record.events[n].is_for(stage)), end)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Rows that run at once, by number."""

    ways: dict[int, Way]

    @cached_property
    def turns(self) -> tuple[tuple[int, int], ...]:
        """Row and part, of all stages in one order."""
        numbers = list(self.ways)
        turns = order(tuple(way.parts for way in self.ways.values())).turns
        return tuple((numbers[turn.row], turn.part) for turn in turns)

    def steps(self, stage: int) -> list[int]:
        """Rows in the order in which this stage goes on with them, each time until it pauses or ends."""
        beginnings = [row for row, way in self.ways.items() if not way.begins(stage)]
        turns = [row for row, part in self.turns if self.ways[row].parts[part].stage == stage]
        return [*beginnings, *turns, *(row for row, way in self.ways.items() if way.ends(stage))]

    def letters(self) -> Iterator[Letter]:
        """All that is sent, in the order of the turns."""
        for row, part in self.turns:
            for letter in self.ways[row].letters[part]:
                yield letter._replace(key=letter.key._replace(row=row))
