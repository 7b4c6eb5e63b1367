"""CFG parallelism and batching across requests, which are one mechanism: deal rows to ranks, join rows, exchange.

Knows nothing of models: which arguments carry rows comes in as `RowRules`. One rank is the same path without a wire.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from denoised.errors import one_line
from denoised.steps import rows
from denoised.steps.dealing import Placement, group
from denoised.steps.forward import Call
from denoised.steps.rows import Piece, RowRules
from denoised.steps.wire import Parcel, Wire

CHANGED = (
    "an argument was changed in place after the call and before it was computed; set defer=False in the model's spec"
)


@dataclass(kw_only=True)
class Work:
    """What this rank did for one request: counted where forwards run."""

    forwards: int = 0
    rows: int = 0
    rows_joined: int = 0
    seconds: float = 0.0


@dataclass(kw_only=True)
class Outcome:
    """One tick's forwards on this rank: outputs and errors by piece, and the pieces of all ranks."""

    pieces: list[tuple[int, Piece]]
    outputs: dict[Any, Any] = field(default_factory=dict)
    errors: dict[Any, str] = field(default_factory=dict)


class Guidance:
    """Deals denoiser calls to the ranks of the cfg axis.

    Args:
        rules: how a call splits into rows.
        join: whether rows of different requests may share a forward.
        max_rows: rows of one joined forward at most.
    """

    def __init__(
        self, *, rules: Callable[[Call], RowRules], num_ranks: int, rank: int, join: bool, max_rows: int
    ) -> None:
        self._rules, self._join, self._max_rows, self._rank = rules, join, max_rows, rank
        self.placement = Placement(num_ranks=num_ranks)
        self.work: dict[str, Work] = {}
        self._verdicts: dict[Any, bool] = {}

    def run(self, calls: Sequence[Call]) -> Outcome:
        """Deal `calls` and run this rank's part. No collective happens here, so an error here cannot hang others."""
        changed = {call for call in calls if call.versions is not None and call.versions.changed}
        pieces = self.placement.deal(calls, lambda call: call not in changed and self._splittable(call))
        outcome = Outcome(pieces=pieces, errors={p.key: CHANGED for _, p in pieces if p.call in changed})
        mine = [piece for rank, piece in pieces if rank == self._rank and piece.call not in changed]
        groups = group(mine, self._rules, self._may_join, self._max_rows if self._join else 1)
        for together in groups:
            self._run_group(together, outcome)
        return outcome

    def finish(self, calls: Sequence[Call], outcome: Outcome, wire: Wire | None) -> dict[Call, Any]:
        """Exchange predictions and put each call's rows together. Calls with a failed piece are left out."""
        good = [(rank, piece) for rank, piece in outcome.pieces if piece.key not in outcome.errors]
        outputs = outcome.outputs
        if wire is not None:
            parcels = [Parcel(rank=rank, key=piece.key) for rank, piece in good]
            outputs = wire.exchange(parcels, {k: v for k, v in outputs.items() if k not in outcome.errors})
        results = {}
        for call in calls:
            parts = [piece for _, piece in outcome.pieces if piece.call is call]
            if all(piece.key in outputs for piece in parts):
                results[call] = rows.assemble(parts, [outputs[piece.key] for piece in parts])
        return results

    def release(self, task_id: str) -> Work:
        """Forget a request; what was done for it here."""
        self.placement.release(task_id)
        return self.work.pop(task_id, Work())

    def _run_group(self, pieces: list[Piece], outcome: Outcome) -> None:
        started = time.perf_counter()
        try:
            outputs = rows.run(pieces, self._rules(pieces[0].call))
        except Exception as error:
            if len(pieces) > 1:  # find out whose fault it is: the others must not suffer
                for piece in pieces:
                    self._run_group([piece], outcome)
                return
            outcome.errors[pieces[0].key] = one_line(error)
            return
        outcome.outputs.update(zip((p.key for p in pieces), outputs, strict=True))
        self._count(pieces, time.perf_counter() - started)

    def _count(self, pieces: list[Piece], seconds: float) -> None:
        """A forward shared by several requests counts for each of them; its seconds are split by rows."""
        total = sum(len(piece.rows) for piece in pieces)
        for task_id in dict.fromkeys(piece.call.task_id for piece in pieces):
            own = sum(len(piece.rows) for piece in pieces if piece.call.task_id == task_id)
            work = self.work.setdefault(task_id, Work())
            work.forwards += 1
            work.rows += own
            work.rows_joined += own if len(pieces) > 1 else 0
            work.seconds += seconds * own / total

    # Rules that nobody declared are tried out once per denoiser before the engine relies on them.

    def _splittable(self, call: Call) -> bool:
        rules, batch = self._rules(call), rows.batch_size(call)
        if rules.whole or batch == 1 or self.placement.num_ranks == 1:
            return not rules.whole
        singles = [Piece(call=call, rows=(row,), batch=batch) for row in range(batch)]
        return rules.trusted or self._verdict("split", singles)

    def _may_join(self, first: Piece, other: Piece) -> bool:
        rules = self._rules(first.call)
        if not self._join or rules.whole or not rows.shares_tensors(first.call, other.call, rules):
            return False
        if rules.trusted or first.call.task_id == other.call.task_id:
            return True
        return self._verdict("join", [first, other])

    def _verdict(self, doubt: str, pieces: list[Piece]) -> bool:
        call, rules = pieces[0].call, self._rules(pieces[0].call)
        sizes = tuple(len(piece.rows) for piece in pieces)
        question = (doubt, call.target.name, sizes, rows.row_pattern(call, rules))
        if question not in self._verdicts:
            self._verdicts[question] = rows.agree(pieces, rules)
        return self._verdicts[question]
