"""Ranks that decide for themselves and yet gather the weights of every block together.

They run a forward each at the same time, and agree in it, once, whether anybody's blocks run. Then who skips takes
part in the gathers, and computes nothing. If rows of some rank have to part, all give this forward up and run two:
first those that compute, then those that skip; a rank without rows in one of them keeps the others company.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from denoised.features.cache.course import BlockCall
from denoised.features.cache.policy import Look, Policy
from denoised.steps import collectives
from denoised.steps.collectives import Group
from denoised.steps.forward import Decision, Part, PartedError
from denoised.steps.tally import count


class Mood(NamedTuple):
    """Of one rank, or of all. computes: blocks run; apart: rows of one forward decided differently."""

    computes: bool
    apart: bool


@dataclass(frozen=True, kw_only=True)
class Lockstep:
    """group: ranks that gather weights together, each with rows of its own.
    attends: for each block of the model, in order, what takes part in the gathers of its weights."""

    group: Group
    attends: Sequence[Callable[[], None]]

    def agree(self, own: Mood, device: torch.device) -> Mood:
        """What anybody is in."""
        count("cache_agreed")
        found = collectives.all_reduce(torch.tensor(own, dtype=torch.int32, device=device), self.group)
        return Mood(*(number > 0 for number in found.tolist()))


class Company:
    """A forward of other ranks' rows, for the gathers in it alone: nobody's past changes.

    runs: its first blocks may run here; else all that is done is to gather.
    """

    def __init__(self, policy: Policy, lockstep: Lockstep, *, runs: bool) -> None:
        self._look, self._lockstep, self._runs, self._place = policy.look, lockstep, runs, 0

    def block(self, call: BlockCall) -> Any:
        if not self._runs:
            attend_first(self._look, self._lockstep)
        if self._place == self._look.first or not self._runs:
            self._meet(call)
        self._place += 1
        return call.run()

    def _meet(self, call: BlockCall) -> None:
        if self._look.probe == "input" and self._runs:
            call.attend()
        mood = self._lockstep.agree(Mood(computes=False, apart=False), call.device)
        if mood.apart:
            raise PartedError([(), ()])
        if self._runs and mood.computes:
            return
        rest = self._lockstep.attends[self._look.first :]
        for attend in rest if mood.computes else rest[len(rest) - self._look.last :]:
            attend()
        raise EnoughError

    def run(self, forward: Callable[[], Any]) -> Any:
        """There is nothing to remember."""
        return forward()


class EnoughError(Exception):
    """Company that is needed no longer."""

    def __init__(self) -> None:
        super().__init__("the others gather nothing more")


class Computed:
    """A forward in which all blocks run, whatever the cache would say.

    apart: the others know, because they parted for its sake. Until then it cannot begin: what it writes to a store
    could not be taken back if rows of another rank have to part.
    """

    def __init__(self, policy: Policy, parts: Sequence[Part], lockstep: Lockstep | None, *, apart: bool) -> None:
        self._policy, self._parts, self._lockstep, self._apart, self._place = policy, parts, lockstep, apart, 0

    def block(self, call: BlockCall) -> Any:
        if self._lockstep is not None:
            self._meet(call, self._lockstep)
        self._place += 1
        return call.run()

    def _meet(self, call: BlockCall, lockstep: Lockstep) -> None:
        if not self._apart:
            attend_first(self._policy.look, lockstep)
            lockstep.agree(Mood(computes=True, apart=True), call.device)
            raise PartedError([tuple(range(sum(len(rows) for _, rows in self._parts))), ()])
        if self._place == self._policy.look.first:
            if self._policy.look.probe == "input":
                call.attend()
            lockstep.agree(Mood(computes=True, apart=False), call.device)

    def run(self, forward: Callable[[], Any]) -> Any:
        output = forward()
        for call, rows in self._parts:
            by, at = self._policy.name, call.step
            call.decisions += [Decision(by=by, row=row, step=at, computed=True) for row in rows]
        return output


def attend_first(look: Look, lockstep: Lockstep) -> None:
    """The gathers up to the decision."""
    for attend in lockstep.attends[: look.first]:
        attend()
    if look.probe == "input":
        lockstep.attends[look.first]()
