"""What ranks agree on in the middle of a tick: that they do the same, whose calls failed, and what comes next."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

from denoised.features.guidance import Outcome
from denoised.runtime.protocol import Command
from denoised.runtime.results import InFlight
from denoised.steps.forward import Call
from denoised.steps.wire import DesyncError, Header, Wire

# Seconds that a rank which failed waits for ranks that may be stuck in the forward it left, beyond thrice the longest.
COMPANY_PATIENCE = 5.0


class Agreement:
    """`wire` is None where there is one rank, which agrees with itself.

    entangled: component calls hold collectives, so that a rank that fails in one may leave others waiting in it.
    """

    def __init__(self, wire: Wire | None, *, entangled: bool) -> None:
        self._wire, self._entangled, self._longest = wire, entangled, 0.0

    def reach(
        self,
        calls: list[Call],
        ended: list[InFlight],
        errors: dict[int, str],
        outcome: Outcome,
        commands: Callable[[], list[Command]],
        busy: float,
    ) -> tuple[list[Command], tuple[float, ...]]:
        """Errors of any rank become errors of all; rank 0's commands, everyone's. Also how busy each rank was.

        Args:
            calls, errors, outcome: of this tick. `errors` and those of `outcome` are added to.
            ended: requests that ended in the tick before.
            commands: asked once, on rank 0.
            busy: seconds of this tick.

        Raises:
            DesyncError: ranks do not do the same any more.
        """
        self._longest = max(self._longest, busy)
        if self._wire is None:
            return commands(), (busy,)
        for key, problem in self._wire.prepare(outcome.outputs).items():
            outcome.errors[key] = problem
        orders = commands() if self._wire.rank == 0 else []
        plan = ([_name(c) for c in calls], [(r, p.key) for r, p in outcome.pieces], [_end(f) for f in ended])
        problems = [*errors.values(), *outcome.errors.values()]
        header = self._header(self._wire, plan, problems, commands=bool(orders), busy=busy)
        if header.errors:
            for other_errors, other_pieces in self._wire.gather_objects((errors, outcome.errors)):
                errors.update(other_errors)
                outcome.errors.update(other_pieces)
        if header.news:
            self._wire.learn_layouts()
        return self._wire.from_first(orders) if header.commands else [], header.busy

    def _header(self, wire: Wire, plan: Any, problems: list[str], *, commands: bool, busy: float) -> Header:
        patience = COMPANY_PATIENCE + 3 * self._longest if problems and self._entangled else None
        digest = zlib.crc32(repr(plan).encode())
        try:
            return wire.header(digest=digest, errors=bool(problems), commands=commands, busy=busy, patience=patience)
        except DesyncError as error:
            raise DesyncError(f"{error}: {problems[0]}" if problems else str(error)) from error


def _name(call: Call) -> tuple[str, str, str, int]:
    return (call.task_id, call.target.name, call.target.method, call.branch)


def _end(flight: InFlight) -> tuple[str, bool]:
    return (flight.task.task_id, flight.task.error is None)
