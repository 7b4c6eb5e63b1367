"""One forward under way: which of its blocks run, what stands for the others, and what its rows will remember.

Nothing that rows remember is changed before the forward has succeeded. Rows that decide differently are parted: the
forward is given up and run again for each group (`steps.forward.PartedError`), so all rows of one forward go one way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from denoised.errors import EngineError
from denoised.features.cache.change import Group, changes, magnitude
from denoised.features.cache.course import Added, BlockCall, Course
from denoised.features.cache.expansion import Expansion
from denoised.features.cache.lockstep import Lockstep, Mood
from denoised.features.cache.policy import Past, Policy
from denoised.features.cache.rows import Batch, Unit, Visit
from denoised.features.cache.trees import Path, at, filled, places
from denoised.steps.forward import Decision, PartedError
from denoised.steps.tally import count


class Passage:
    """Args:
    group: ranks that share the forward; None: there is one.
    look_inside: gives what the attention of a block would be given, without running the block to its end.
    lockstep: ranks whose forwards gather weights together with this one; None: there are none.
    """

    def __init__(
        self,
        policy: Policy,
        units: list[Unit],
        *,
        group: Group | None,
        look_inside: Callable[[BlockCall], list[Tensor]],
        lockstep: Lockstep | None = None,
    ) -> None:
        self._lockstep, self._attends = lockstep, False
        self._policy, self._units, self._group, self._look_inside = policy, units, group, look_inside
        self._batch = Batch(sum(len(unit.rows) for unit in units))
        self._course = Course(first=policy.look.first, last=policy.look.last)
        self._place = 0
        self._start: BlockCall | None = None
        self._probe: list[Tensor] = []
        self._pasts = [unit.state.past.computed() for unit in units]
        self._changes: list[float | None] = [None] * len(units)
        self._skips: bool | None = None

    def run(self, forward: Callable[[], Any]) -> Any:
        """The forward's output."""
        output = forward()
        self.commit()
        return output

    def block(self, call: BlockCall) -> Any:
        """What a block gives, called in the order of the program."""
        if self._place == self._policy.look.first and self._skips is None:
            self._decide(call)
        place, self._place = self._place, self._place + 1
        return self._skip(place, call) if self._skips else self._course.run(call)

    # ------------------------------------------------------------------ the decision

    def _decide(self, call: BlockCall) -> None:
        self._probe = self._look(call)
        states = [unit.state for unit in self._units]
        decided = [state.fixed for state in states if state.fixed is not None]
        if len(decided) < len(states):
            decided = self._decisions()
        mood = self._mood(decided, call)
        if mood.apart:
            self._part(decided)
        self._attends = self._lockstep is not None and mood.computes
        self._skips, self._pasts = decided[0][0], [past for _, past in decided]

    def _look(self, call: BlockCall) -> list[Tensor]:
        """What changes are measured on, of all rows."""
        probe = self._policy.look.probe
        if probe == "input":
            return self._look_inside(call)
        if probe == "timestep":
            return [tensor for path, tensor in call.inputs.items() if is_embedding(str(path[0]))]
        return self._course.added_before(call) if probe == "residual" else []

    def _decisions(self) -> list[tuple[bool, Past]]:
        asked = self._asked()
        pairs = [(unit.state.seen, [self._batch.of(unit, tensor) for tensor in self._probe]) for unit in asked]
        found = dict(zip(asked, changes(pairs, self._group) if pairs else [], strict=True))
        self._changes = [found.get(unit) for unit in self._units]
        return [self._policy.decide(unit.state.past, unit.at(), found.get(unit)) for unit in self._units]

    def _asked(self) -> list[Unit]:
        """Whose change decides."""
        return [unit for unit in self._units if unit.state.seen and self._policy.asks(unit.state.past, unit.at())]

    def _mood(self, decided: list[tuple[bool, Past]], call: BlockCall) -> Mood:
        """That of these rows, or of all ranks in lockstep."""
        kinds = {skips for skips, _ in decided}
        own = Mood(computes=False in kinds, apart=len(kinds) > 1)
        return own if self._lockstep is None else self._lockstep.agree(own, call.device)

    def _part(self, decided: list[tuple[bool, Past]]) -> NoReturn:
        """Raises PartedError: first the rows that compute, then those that skip; neither here nor elsewhere may both
        be in one forward."""
        groups: dict[bool, list[int]] = {False: [], True: []}
        for unit, decision in zip(self._units, decided, strict=True):
            unit.state.fixed = decision
            groups[decision[0]] += range(unit.first, unit.first + len(unit.rows))
        count("cache_parted", all(groups.values()))
        raise PartedError([tuple(rows) for rows in groups.values() if rows or self._lockstep is not None])

    # ------------------------------------------------------------------ skipped blocks

    def _skip(self, place: int, call: BlockCall) -> Any:
        visits, look = self._units[0].state.visits, self._policy.look
        if place >= len(visits) or visits[place].stack != call.stack:
            raise EngineError("cache_backend: a forward calls other blocks than the last one that was computed")
        if place >= len(visits) - look.last:
            return call.run()
        if place == look.first or visits[place - 1].stack != call.stack:
            self._start = call
        count("cache_blocks_skipped", self._is_here(place))
        if self._attends:
            count("cache_blocks_attended")
            call.attend()
        visit = visits[place]
        if _ends_range(visits, place, look.last):
            return self._ended(place, call, visit)
        return filled(visit.bare, {path: at(call.named, visit.continues[path]) for path in places(visit.bare)})

    def _ended(self, place: int, call: BlockCall, visit: Visit) -> Any:
        """What a range of blocks gives, whose last one this is."""
        return filled(visit.bare, {path: self._restored(place, path) for path in places(visit.bare)})

    def _restored(self, place: int, path: Path) -> Tensor:
        """What the range's last block gives: the range's input, and what each row remembers of what was added."""
        added = [unit.state.kept[place, path].value(unit.state.past.seen) for unit in self._units]
        came = self._units[0].state.visits[place].continues.get(path)
        if came is None:
            return torch.cat(added)
        assert self._start is not None, "a range has a first block"
        base = self._start.inputs[came]
        return base + self._batch.joined(added, base)

    # ------------------------------------------------------------------ the end

    def commit(self) -> None:
        """The forward has succeeded: its rows remember it."""
        measured = [()] * len(self._units) if self._skips else self._keep()
        for unit, past, values in zip(self._units, self._pasts, measured, strict=True):
            state = unit.state
            if self._policy.look.follows or not self._skips:
                state.seen = self._looked(unit)
            state.past, state.step = past, unit.call.step
            state.fixed = state.looked = state.front = None
            told = functools.partial(Decision, by=self._policy.name, step=state.step, values=values)
            unit.call.decisions += [told(row=row, computed=not self._skips) for row in unit.rows]
        count("cache_forwards_skipped" if self._skips else "cache_forwards_computed")

    def _keep(self) -> list[tuple[float, ...]]:
        """Of a computed forward its blocks, and what each range of them added; gives what was measured, by unit."""
        visits = self._course.visits()
        added = self._added(visits)
        return [
            self._remember(unit, visits, added, change)
            for unit, change in zip(self._units, self._changes, strict=True)
        ]

    # What this rank has.

    def _looked(self, unit: Unit) -> list[Tensor]:
        """What the unit's next change is measured from."""
        return [self._batch.of(unit, tensor) for tensor in self._probe]

    def _is_here(self, place: int) -> bool:
        """Whether the block runs on this rank."""
        return True

    def _added(self, visits: tuple[Visit, ...]) -> list[Added]:
        return list(self._course.added(visits))

    def _remember(
        self, unit: Unit, visits: tuple[Visit, ...], added: list[Added], change: float | None
    ) -> tuple[float, ...]:
        state, order = unit.state, self._policy.look.order
        earlier, now = state.kept, {(one.place, one.path): self._batch.of(unit, one.value) for one in added}
        state.visits = visits if self._skips is not None else ()
        state.kept = {
            key: Expansion.of(value, state.past.seen, order=order, earlier=earlier.get(key))
            for key, value in now.items()
        }
        if not self._policy.look.records or change is None:
            return ()
        before = [expansion.terms[0] for expansion in earlier.values()]
        after = list(now.values())
        return (change, *changes([(before, after)], self._group), magnitude(before, after, self._group))


def is_embedding(name: str) -> bool:
    """Whether a block's parameter of this name is the timestep's embedding."""
    return "temb" in name


def _ends_range(visits: tuple[Visit, ...], place: int, last: int) -> bool:
    return place + 1 == len(visits) - last or visits[place + 1].stack != visits[place].stack
