"""What a cache is, to everything but itself: what it looks at, what it decides for a row at a step, and how long it
remembers. Pure: no tensors, no models, no ranks.

A cache is one file in `policies/`: a `NAME`, a frozen `Config` whose fields are the keys of `cache_config`, and
`make(config)`, which gives its `Policy`. One that `quality` may choose has a `LADDER` too: settings from careful to
bold, which `denoised calibrate` measures.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

# What a row's change since an earlier step is measured on, each as mean |new - old| / mean |old|:
#   input     what the first block's attention is given: its input, normalized and modulated by the timestep
#   timestep  the timestep's embedding as the first block is given it
#   residual  what the first blocks added to the hidden states; they run before the decision
#   none      nothing: the number of the step decides
Probe = Literal["input", "timestep", "residual", "none"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where a row is. number: of num_steps, from 0 (num_steps 0: not known). possible: there is something to reuse."""

    number: int
    num_steps: int
    possible: bool = True

    @property
    def is_last(self) -> bool:
        return 0 < self.num_steps <= self.number + 1


@dataclass(frozen=True, kw_only=True)
class Past:
    """What was decided for a row so far. seen: its forwards; skipped: of these; run: skipped since the last computed
    one. sums: numbers of the policy's own, since then."""

    seen: int = 0
    skipped: int = 0
    run: int = 0
    sums: tuple[float, ...] = ()

    def computed(self) -> Past:
        return Past(seen=self.seen + 1, skipped=self.skipped)

    def skip(self, *sums: float) -> Past:
        return replace(self, seen=self.seen + 1, skipped=self.skipped + 1, run=self.run + 1, sums=sums)


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a policy needs of a forward.

    first, last: blocks that are computed in every step, at either end.
    follows: a change is since the step before; else since the last computed one.
    order: of the Taylor expansion that stands for skipped blocks; 0: what they last added.
    records: nothing is skipped, and each decision carries what was measured.
    """

    probe: Probe
    first: int = 0
    last: int = 0
    follows: bool = False
    order: int = 0
    records: bool = False


def warmed_up(past: Past, step: Step, *, num: int, ratio: float) -> bool:
    """Whether a row has had its first steps: `num`, or that share of all if they are more. What a picture will be is
    settled in the first share of its steps, however many there are."""
    return past.seen >= max(num, int(ratio * step.num_steps + 0.5))


class Policy(Protocol):
    """The decisions of one cache, with its settings."""

    @property
    def name(self) -> str: ...

    @property
    def look(self) -> Look: ...

    def asks(self, past: Past, step: Step) -> bool:
        """Whether `decide` needs the change; measuring it waits for the device, and for other ranks."""
        ...

    def decide(self, past: Past, step: Step, change: float | None) -> tuple[bool, Past]:
        """Whether to skip, and the row's past with this step. change: None if there is nothing to compare with."""
        ...


class Kind(Protocol):
    """A file of `policies/`."""

    NAME: str
    Config: type[Any]

    def make(self, config: Any) -> Policy: ...
