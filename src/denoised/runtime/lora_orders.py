"""Adapters that are loaded and unloaded while the engine runs: what was asked of all replicas, and who has answered.

Everything but `Ask.wait` runs on the client's thread. No torch.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence

from denoised.errors import EngineError, InvalidRequestError
from denoised.runtime.protocol import LoraDone
from denoised.runtime.replicas import Answers

# Seconds that reading an adapter of any size may take, on a disk far away.
PATIENCE = 600.0
GONE = "its ranks died"


def verdict(problems: Sequence[str]) -> str:
    """What becomes of an order with these answers: "" where it was carried out by all that are there, GONE by none."""
    refused = next((problem for problem in problems if problem not in ("", GONE)), None)
    return refused if refused is not None else "" if "" in problems else GONE


class Ask:
    """One order, as its caller sees it."""

    def __init__(self) -> None:
        self._answer: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

    def done(self, problems: list[str]) -> None:
        self._answer.put(problems)

    def wait(self) -> None:
        """Raises InvalidRequestError: a replica refused; EngineError: none of them could act."""
        problem = verdict(self._answer.get(timeout=PATIENCE))
        if problem == GONE:
            raise EngineError("the adapter was not loaded: no ranks are there; ask again when they are back.")
        if problem:
            raise InvalidRequestError(problem)


class Orders:
    """Orders without all answers. A replica answers them in turn; those it answers before they are made are kept, for
    programs under torchrun whose ranks hear of an order sooner than they make it."""

    def __init__(self) -> None:
        self._open: list[Answers] = []
        self._early: list[str] = []

    def make(self, done: Callable[[list[str]], None], replicas: Sequence[int]) -> None:
        """To these replicas, which are sent it next; `done` gets what each of them says."""
        if self._early:
            done([self._early.pop(0)])
            return
        self._open.append(Answers(list(replicas), done))

    def heard(self, replica: int, event: LoraDone, *, keeps: bool) -> None:
        """A replica's answer to its oldest order. `keeps`: one without an order is to come."""
        if not self._answer(replica, event.problem) and keeps:
            self._early.append(event.problem)

    def gone(self, replica: int) -> None:
        """A replica cannot answer any more."""
        while self._answer(replica, GONE):
            pass

    def _answer(self, replica: int, problem: str) -> bool:
        order = next((order for order in self._open if replica in order.missing), None)
        if order is None:
            return False
        order.add(replica, [problem])
        self._open = [order for order in self._open if order.missing]
        return True
