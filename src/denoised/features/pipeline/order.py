"""In which order the stages take their turns with rows. Numbers alone: the same on all ranks, without asking.

A part of a row is what one stage does of it before another goes on. Stages take whatever part was ready first, which
for rows of one kind is round robin: with as many rows as stages nobody waits, but when the first row comes and the
last one goes. Rows of one wave are taken to cost the same, because ranks of other groups, with other rows, must agree.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# What it takes to hand a row over, in blocks: hidden states over PCIe, beside a block on some thousand tokens.
HANDOVER = 0.05


class Part(NamedTuple):
    """`length` calls of blocks of one stage, one after the other."""

    stage: int
    length: int
    cost: float


class Turn(NamedTuple):
    """A part of a row, by its number."""

    row: int
    part: int


@dataclass(frozen=True, kw_only=True)
class Order:
    """All turns of all stages, each after what it waits for, and how long they take (in units of costs)."""

    turns: tuple[Turn, ...]
    seconds: float


def parts(stages: Sequence[int], costs: Sequence[float]) -> tuple[Part, ...]:
    """The parts of a row that calls blocks of these stages and costs."""
    found: list[Part] = []
    for stage, cost in zip(stages, costs, strict=True):
        if found and found[-1].stage == stage:
            last = found.pop()
            found.append(Part(stage, last.length + 1, last.cost + cost))
        else:
            found.append(Part(stage, 1, cost))
    return tuple(found)


@functools.lru_cache(maxsize=256)
def order(rows: tuple[tuple[Part, ...], ...], handover: float = 0.0) -> Order:
    """Every stage takes the part that was ready first. `handover`: what passes between parts of a row."""
    ready, done = [0.0] * len(rows), [0] * len(rows)
    free = dict.fromkeys((part.stage for row in rows for part in row), 0.0)
    turns: list[Turn] = []
    while left := [number for number, row in enumerate(rows) if done[number] < len(row)]:
        start, _, row = min((max(ready[n], free[rows[n][done[n]].stage]), ready[n], n) for n in left)
        part = rows[row][done[row]]
        free[part.stage] = start + part.cost
        ready[row] = free[part.stage] + handover
        turns.append(Turn(row, done[row]))
        done[row] += 1
    return Order(turns=tuple(turns), seconds=max(free.values(), default=0.0))
