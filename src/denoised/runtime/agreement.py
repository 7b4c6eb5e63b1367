"""What ranks agree on in the middle of a tick: that they do the same, whose calls failed, and what comes next."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from denoised.features.guidance import Outcome
from denoised.runtime.protocol import Command
from denoised.runtime.results import InFlight
from denoised.runtime.whole_calls import Whole
from denoised.steps.forward import Call
from denoised.steps.wire import DesyncError, Header, Wire

# Seconds that a rank which failed waits for ranks that may be stuck in the forward it left, beyond thrice the longest.
COMPANY_PATIENCE = 5.0


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """Rank 0's commands, and for each rank the seconds that it ran calls, and that it worked at all."""

    orders: list[Command]
    ran: tuple[float, ...]
    worked: tuple[float, ...]


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
        whole: Whole,
        outcome: Outcome,
        commands: Callable[[], list[Command]],
        *,
        ran: float,
        worked: float,
    ) -> Agreed:
        """Errors of any rank become errors of all; rank 0's commands, everyone's. Also how busy each rank was.

        Args:
            calls, whole, outcome: of this tick. The errors of both are added to.
            ended: requests that ended in the tick before.
            commands: asked once, on rank 0.
            ran, worked: seconds that this rank ran calls, and that it worked at all, since the last agreement.

        Raises:
            DesyncError: ranks do not do the same any more.
        """
        self._longest = max(self._longest, ran)
        if self._wire is None:
            return Agreed(orders=commands(), ran=(ran,), worked=(worked,))
        self._prepare(self._wire, whole, outcome)
        orders = commands() if self._wire.rank == 0 else []
        names, pieces = [_name(call) for call in calls], [(rank, piece.key) for rank, piece in outcome.pieces]
        problems = [*whole.errors.values(), *outcome.errors.values()]
        plan = (names, sorted(whole.away.items()), pieces, [_end(flight) for flight in ended])
        header = self._header(self._wire, plan, problems, commands=bool(orders), ran=ran, worked=worked)
        if header.errors:
            for other_errors, other_pieces in self._wire.gather_objects((whole.errors, outcome.errors)):
                whole.errors.update(other_errors)
                outcome.errors.update(other_pieces)
        if header.news:
            self._wire.learn_layouts()
        orders = self._wire.from_first(orders) if header.commands else []
        return Agreed(orders=orders, ran=header.ran, worked=header.worked)

    @staticmethod
    def _prepare(wire: Wire, whole: Whole, outcome: Outcome) -> None:
        """Take apart what will travel; what cannot is an error."""
        for key, problem in wire.prepare({**whole.outputs, **outcome.outputs}).items():
            if key in whole.outputs:
                whole.errors[key[-1]] = problem
            else:
                outcome.errors[key] = problem

    def _header(self, wire: Wire, plan: Any, problems: list[str], **told: Any) -> Header:
        patience = COMPANY_PATIENCE + 3 * self._longest if problems and self._entangled else None
        digest = zlib.crc32(repr(plan).encode())
        try:
            return wire.header(digest=digest, errors=bool(problems), patience=patience, **told)
        except DesyncError as error:
            raise DesyncError(f"{error}: {problems[0]}" if problems else str(error)) from error


def _name(call: Call) -> tuple[str, str, str, int]:
    return (call.task_id, call.target.name, call.target.method, call.branch)


def _end(flight: InFlight) -> tuple[str, bool]:
    return (flight.task.task_id, flight.task.error is None)
