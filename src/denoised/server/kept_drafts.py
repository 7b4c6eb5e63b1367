"""Drafts: pictures that were begun and put aside, each with the checkpoint to go on from. In memory, and bounded: by
number, by bytes, by age. They belong to the key that made them; for others they are not there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from denoised.server.problems import Refusal
from denoised.server.settings import MIB, ServerConfig


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A picture after `step` of `total_steps`. `family`: drafts that were asked for together have it in common.

    `checkpoint` holds all that was asked, and takes `num_bytes`. Times are Unix seconds.
    """

    id: str
    family: str
    tenant: str
    model: str
    prompt: str
    checkpoint: Any
    num_bytes: int
    seed: int
    step: int
    total_steps: int
    created_at: float
    expires_at: float


class KeptDrafts:
    """The drafts of a server. The oldest of the tenant who has the most bytes make room."""

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.time) -> None:
        self._max_number, self._max_bytes = config.max_drafts, config.max_drafts_mb * MIB
        self.seconds = config.draft_minutes * 60
        self._clock = clock
        self._drafts: dict[str, Draft] = {}
        self._continued: set[str] = set()

    @property
    def num_bytes(self) -> int:
        return sum(draft.num_bytes for draft in self._drafts.values())

    def now(self) -> float:
        return self._clock()

    def keep(self, draft: Draft) -> None:
        """Add a draft; others make room, but none that was asked for together with it.

        Raises:
            Refusal: 507, those alone are too many or too large.
        """
        self.sweep()
        while self._is_full(draft):
            self._drop(self._victim(draft).id)
        self._drafts[draft.id] = draft
        # Memory is given back in time, also if nobody asks for a draft any more.
        asyncio.get_running_loop().call_later(max(0.0, draft.expires_at - self._clock()) + 0.1, self.sweep)

    def _is_full(self, draft: Draft) -> bool:
        too_many = len(self._drafts) + 1 > self._max_number
        return too_many or self.num_bytes + draft.num_bytes > self._max_bytes

    def _victim(self, draft: Draft) -> Draft:
        others = [other for other in self._drafts.values() if other.family != draft.family]
        if not others:
            most = f"--max-drafts={self._max_number} and --max-drafts-mb={self._max_bytes // MIB}"
            message = f"n: that many drafts of this size are more than {most} allow; ask for fewer or smaller ones."
            raise Refusal(507, message, param="n", code="out_of_memory", headers={"x-should-retry": "false"})
        held: dict[str, int] = {}
        for other in others:
            held[other.tenant] = held.get(other.tenant, 0) + other.num_bytes
        return next(other for other in others if held[other.tenant] == max(held.values()))

    def sweep(self) -> None:
        """Drop what is too old."""
        now = self._clock()
        for draft in [d for d in self._drafts.values() if d.expires_at <= now]:
            self._drop(draft.id)

    def all(self, tenant: str) -> list[Draft]:
        """A tenant's drafts, oldest first."""
        self.sweep()
        return [draft for draft in self._drafts.values() if draft.tenant == tenant]

    def get(self, draft_id: str, tenant: str) -> Draft:
        """A tenant's draft.

        Raises:
            Refusal: 404, there is none, or none any more.
        """
        self.sweep()
        draft = self._drafts.get(draft_id)
        if draft is None or draft.tenant != tenant:
            message = f"draft_id={draft_id!r:.80}: there is no such draft, or no more; make it again."
            raise Refusal(404, message, param="draft_id", code="not_found")
        return draft

    def drop(self, drafts: Iterable[str]) -> None:
        """Forget drafts; what goes on from one of them goes on."""
        for draft_id in drafts:
            self._drop(draft_id)

    def _drop(self, draft_id: str) -> None:
        self._drafts.pop(draft_id, None)

    # ---- going on

    def begin(self, draft_id: str) -> None:
        """Somebody goes on from a draft.

        Raises:
            Refusal: 409, somebody does already.
        """
        if draft_id in self._continued:
            message = f"draft_id={draft_id}: it is being continued already; wait for that, or hang up there first."
            raise Refusal(409, message, param="draft_id", code="in_progress")
        self._continued.add(draft_id)

    def end(self, draft_id: str) -> None:
        self._continued.discard(draft_id)
