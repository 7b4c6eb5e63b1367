"""A forward through the stages of a pipeline, each of which has some of the blocks.

Every stage runs the whole program and makes every decision, and none has all that these need. So a row that must be
looked at goes twice: up to the decision, for which the stage that sees the change tells the others in a few bytes; and
then as what was decided, so that all know beforehand which blocks will run. What its first blocks gave is kept.

What a range of blocks added is kept by the stage of its last block, and there alone: in a skipped forward that stage
stands in for the range, and no other one is woken for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

from torch import Tensor

from denoised.features.cache.change import quotients, summed
from denoised.features.cache.course import Added, BlockCall, Course
from denoised.features.cache.passage import Passage, is_embedding
from denoised.features.cache.rows import Unit, Visit
from denoised.features.cache.trees import leaves
from denoised.steps.tally import count


class Stages(Protocol):
    """A denoiser that is cut into stages, seen from one of them. Every stage makes the same calls, in one order."""

    def leg(
        self, kind: Any, *, early: bool, begin: Callable[[], None], end: Callable[[], None]
    ) -> AbstractContextManager[None]:
        """The forward inside is of this kind: those of one kind and signature call the same blocks. It may be tried
        twice: begin, end: called at either end. early: it goes before others that wait."""
        ...

    def stand_in(self, block: Any, function: Callable[[], Any], used: Sequence[Tensor], *, for_all: bool) -> Any:
        """What `function` gives at the block's stage, for whoever needs it, in place of the block's output. used: what
        it looks at. for_all: the others need it too, to decide what to do next."""
        ...

    def need(self, block: Any, used: Sequence[Tensor]) -> None:
        """The block's stage looks at these."""
        ...

    def owns(self, block: Any) -> bool:
        """Whether the block is this stage's."""
        ...

    def body(self, block: Any) -> Callable[..., Any]:
        """The block's own forward, for its stage."""
        ...


@dataclass(frozen=True, kw_only=True)
class Front:
    """What the first blocks of a forward gave that was then given up; of other stages' blocks nothing that counts."""

    outputs: tuple[Any, ...]
    num_rows: int


class StagedPassage(Passage):
    """Args:
    stages: of the denoiser.
    """

    def __init__(self, *args: Any, stages: Stages, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stages = stages
        states, look = [unit.state for unit in self._units], self._policy.look
        self._fixed = [state.fixed for state in states if state.fixed is not None]
        asked = self._asked() if len(self._fixed) < len(states) and look.probe != "none" else []
        self._asks, self._num_asked = bool(asked), len(asked)
        self._front = _shared_front(self._units, self._batch.num_rows)
        self._sees = look.probe != "none" and any(state.looked is None for state in states)

    def run(self, forward: Callable[[], Any]) -> Any:
        if not self._asks:
            self._know()
        with self._stages.leg(self._kind, early=self._asks, begin=self._begin, end=self._end):
            output = forward()
        self.commit()
        return output

    @property
    def _kind(self) -> Any:
        if self._asks:
            return "asks", self._num_asked
        return "skips" if self._skips else "computes", self._sees, self._front is not None

    def _know(self) -> None:
        """What can be decided without a look."""
        decided = self._fixed
        if len(decided) < len(self._units):
            decided = [self._policy.decide(unit.state.past, unit.at(), None) for unit in self._units]
        if len({skips for skips, _ in decided}) > 1:
            self._part(decided)
        self._skips, self._pasts = decided[0][0], [past for _, past in decided]

    def _begin(self) -> None:
        self._course = Course(first=self._policy.look.first, last=self._policy.look.last)
        self._place, self._start, self._blocks = 0, None, list[Any]()
        self._given: list[tuple[Any, list[int]]] = []

    def _end(self) -> None:
        """What a range added is of use to the stage of its last block."""
        if not self._skips:
            for one in self._course.added(self._course.visits()):
                used = [one.after] if one.before is None else [one.after, one.before]
                self._stages.need(self._blocks[one.place], used)

    def block(self, call: BlockCall) -> Any:
        if self._place == self._policy.look.first:
            self._reach(call)
        place, self._place = self._place, self._place + 1
        self._blocks.append(call.block)
        if place < self._policy.look.first:
            return self._first(place, call)
        return self._skip(place, call) if self._skips else self._course.run(call)

    def _first(self, place: int, call: BlockCall) -> Any:
        """The block's output, if need be from the forward that was given up."""
        if self._front is not None:
            known = self._front.outputs[place]
            call = replace(call, run=lambda: self._stages.stand_in(call.block, lambda: known, (), for_all=False))
        output = self._course.run(call)
        self._given.append((output, _versions(output)))
        return output

    # ------------------------------------------------------------------ the decision

    def _reach(self, call: BlockCall) -> None:
        if self._asks:
            self._ask(call)
        elif self._sees:
            used, block = self._sight(call)
            self._stages.need(block, used)
            self._probe = self._seen(call, used) if self._stages.owns(block) else _elsewhere(used)

    def _sight(self, call: BlockCall) -> tuple[list[Tensor], Any]:
        """What changes are measured on, or is made of, and the block at whose stage it is right."""
        probe = self._policy.look.probe
        if probe == "residual":
            return self._course.added_before(call), self._blocks[-1]
        if probe == "timestep":
            return [tensor for path, tensor in call.inputs.items() if is_embedding(str(path[0]))], call.block
        return list(call.inputs.values()), call.block

    def _seen(self, call: BlockCall, used: list[Tensor]) -> list[Tensor]:
        return self._look_inside(call) if self._policy.look.probe == "input" else used

    def _ask(self, call: BlockCall) -> NoReturn:
        used, block = self._sight(call)
        self._probe = _elsewhere(used)
        measure = functools.partial(self._measure, call, used)
        sums = self._stages.stand_in(block, measure, used, for_all=True)
        found = dict(zip(self._asked(), quotients(sums), strict=True))
        count("cache_told")
        self._remember_front()
        self._part([self._policy.decide(unit.state.past, unit.at(), found.get(unit)) for unit in self._units])

    def _measure(self, call: BlockCall, used: list[Tensor]) -> Tensor:
        self._probe = self._seen(call, used)
        asked = self._asked()
        return summed(
            [(unit.state.seen, [self._batch.of(unit, t) for t in self._probe]) for unit in asked], self._group
        )

    def _remember_front(self) -> None:
        """What was seen and computed, for the forward that follows."""
        unchanged = all(versions and versions == _versions(output) for output, versions in self._given)
        outputs = tuple(
            output if self._stages.owns(block) else None
            for (output, _), block in zip(self._given, self._blocks, strict=True)
        )
        front = Front(outputs=outputs, num_rows=self._batch.num_rows) if outputs and unchanged else None
        for unit in self._units:
            unit.state.looked = [self._batch.of(unit, tensor) for tensor in self._probe]
            unit.state.front = front

    # ------------------------------------------------------------------ what this stage has

    def _looked(self, unit: Unit) -> list[Tensor]:
        return super()._looked(unit) if unit.state.looked is None else unit.state.looked

    def _is_here(self, place: int) -> bool:
        return self._stages.owns(self._blocks[place])

    def _added(self, visits: tuple[Visit, ...]) -> list[Added]:
        return [one for one in super()._added(visits) if self._is_here(one.place)]

    def _ended(self, place: int, call: BlockCall, visit: Visit) -> Any:
        """What the range gives, from the stage of its last block."""
        assert self._start is not None, "a range has a first block"
        used = [self._start.inputs[came] for came in visit.continues.values()]
        return self._stages.stand_in(
            call.block, functools.partial(super()._ended, place, call, visit), used, for_all=False
        )


def _shared_front(units: Sequence[Unit], num_rows: int) -> Front | None:
    """What the first blocks gave for just these rows."""
    front = units[0].state.front
    fits = isinstance(front, Front) and front.num_rows == num_rows and all(u.state.front is front for u in units)
    return front if fits else None


def _elsewhere(tensors: Sequence[Tensor]) -> list[Tensor]:
    """For what another stage has: there is something, and how much of it."""
    return [tensor.new_empty(0) for tensor in tensors]


def _versions(output: Any) -> list[int]:
    """Grow with each change in place; empty if nobody counts."""
    found = list(_tensors(output))
    return [] if any(tensor.is_inference() for tensor in found) else [tensor._version for tensor in found]


def _tensors(output: Any) -> Iterator[Tensor]:
    yield from leaves(output).values()
