"""CFG parallelism and batching across requests, which are one mechanism: deal rows to ranks, join rows, exchange.

Knows nothing of models: which arguments carry rows comes in as `RowRules`. One rank is the same path without a wire.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from denoised.errors import EngineError, one_line
from denoised.steps import rows
from denoised.steps.dealing import Placement, course, group
from denoised.steps.forward import Call, Decision, Stage
from denoised.steps.rows import Piece, RowRules
from denoised.steps.tally import count, counted
from denoised.steps.wire import Parcel

CHANGED = (
    "an argument was changed in place after the call and before it was computed; set defer=False in the model's spec"
)


@dataclass(kw_only=True)
class Work:
    """What this rank did for one request: counted where forwards run. `counts` are those of `steps.tally`.

    decisions: what features decided for its rows, in order, each with its denoiser and branch.
    peaks_mb: the most memory that was in use while one of its encoder and VAE calls ran, by stage.
    loras: of each adapter, as bits, the layers that this rank would run it in, and those in which it ran.
    """

    forwards: int = 0
    rows: int = 0
    rows_joined: int = 0
    seconds: float = 0.0
    idle_seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    decisions: list[tuple[str, int, Decision]] = field(default_factory=list)
    peaks_mb: dict[str, float] = field(default_factory=dict)
    loras: list[tuple[int, int]] = field(default_factory=list)

    def rose_to(self, stage: Stage, mb: float) -> None:
        """So much memory was in use while this stage ran."""
        self.peaks_mb[stage.value] = max(self.peaks_mb.get(stage.value, 0.0), mb)


class Stages(Protocol):
    """A denoiser whose forwards overlap if they are given together."""

    @property
    def num_stages(self) -> int: ...

    def run_many(self, calls: Sequence[Callable[[], Any]], *, return_exceptions: bool = False) -> list[Any]:
        """The results of all, in order, or what they raised."""
        ...

    def bubble(self) -> float:
        """The share of the last `run_many` in which this rank waited."""
        ...


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
        sticky: rows stay on the rank that first ran them, where features remember what they need of them.
        lockstep: ranks of the cfg axis share weights that are gathered inside a forward, so that all must run as many
            forwards of each denoiser, through the same blocks at the same time. A rank with fewer of one kind runs
            another's rows and drops the result.
        entangled: a forward holds collectives. One that requests share is then not tried again row by row when it
            fails: the engine starts anew and runs them apart.
        stages: denoisers that are cut into pipeline stages, by name.
    """

    def __init__(
        self,
        *,
        rules: Callable[[Call], RowRules],
        num_ranks: int,
        rank: int,
        join: bool,
        max_rows: int,
        sticky: bool = True,
        lockstep: bool = False,
        entangled: bool = False,
        stages: Mapping[str, Stages] | None = None,
    ) -> None:
        self._rules, self._join, self._max_rows, self._rank = rules, join, max_rows, rank
        self._lockstep, self._entangled, self._stages = lockstep, entangled, dict(stages or {})
        self.placement = Placement(num_ranks=num_ranks, sticky=sticky)
        self.work: dict[str, Work] = {}
        self._verdicts: dict[Any, bool] = {}

    def run(
        self, calls: Sequence[Call], price: Callable[[Call], float] = rows.cost, taken: Sequence[float] = ()
    ) -> Outcome:
        """Deal `calls` and run this rank's part. Errors are kept, not raised: all ranks must agree on them first.

        Args:
            price, taken: of rows, and of what else each rank does in this tick, as `Placement.deal` takes them.
        """
        changed = {call for call in calls if call.versions is not None and call.versions.changed}
        pieces = self.placement.deal(calls, lambda call: call not in changed and self._splittable(call), price, taken)
        outcome = Outcome(pieces=pieces, errors={p.key: CHANGED for _, p in pieces if p.call in changed})
        ranks = range(self.placement.num_ranks) if self._lockstep else (self._rank,)
        plans = {rank: self._groups([p for r, p in pieces if r == rank and p.call not in changed]) for rank in ranks}
        for _, part in itertools.groupby(self._program(plans), key=lambda entry: _denoiser(entry[0])):
            self._run_part(list(part), outcome)
        return outcome

    def _run_part(self, part: list[tuple[list[Piece], bool]], outcome: Outcome) -> None:
        """Forwards of one denoiser: overlapping if it is cut into stages, else in turn."""
        stages = self._stages.get(_denoiser(part[0][0]))
        if stages is not None:
            self._run_staged(stages, part, outcome)
            return
        for together, is_mine in part:
            if is_mine:
                self._run_group(together, outcome)
            else:
                self._run_for_company(together)

    def _groups(self, pieces: list[Piece]) -> list[list[Piece]]:
        return group(pieces, self._rules, self._may_join, self._row_limit(pieces) if self._join else 1)

    def _row_limit(self, pieces: list[Piece]) -> int:
        """Of one forward. Stages overlap on different forwards, so as many forwards are left as there are stages."""
        num_stages = max((stages.num_stages for stages in self._stages.values()), default=1)
        return min(self._max_rows, max(1, sum(len(piece.rows) for piece in pieces) // num_stages))

    def _program(self, plans: dict[int, list[list[Piece]]]) -> list[tuple[list[Piece], bool]]:
        """This rank's forwards; in lockstep also those it has too few of, kind by kind in one order."""
        mine = plans[self._rank]
        if not self._lockstep:
            return [(together, True) for together in mine]
        program = []
        for kind in sorted({_course(together) for plan in plans.values() for together in plan}):
            own = [together for together in mine if _course(together) == kind]
            most = max(([g for g in plan if _course(g) == kind] for plan in plans.values()), key=len)
            program += [(g, True) for g in own] + [(g, False) for g in most[len(own) :]]
        return program

    @staticmethod
    def parcels(outcome: Outcome) -> list[Parcel]:
        """What has to travel of it: the predictions of all pieces that did not fail."""
        return [Parcel(rank=rank, key=p.key) for rank, p in outcome.pieces if p.key not in outcome.errors]

    @staticmethod
    def finish(calls: Sequence[Call], outcome: Outcome, outputs: Mapping[Any, Any]) -> dict[Call, Any]:
        """Put each call's rows together, once `outputs` has those of all ranks. Calls with a failed piece are left
        out."""
        results = {}
        for call in calls:
            parts = [piece for _, piece in outcome.pieces if piece.call is call]
            if all(piece.key in outputs for piece in parts):
                results[call] = rows.assemble(parts, [outputs[piece.key] for piece in parts])
        return results

    def outlook(self, call: Call) -> tuple[str, int, tuple[int | None, ...]]:
        """What a call shares forwards with (calls of equal signature), elements of a row, and each row's rank."""
        return repr(rows.signature(call, self._rules(call))), rows.cost(call), self.placement.homes(call)

    def work_of(self, task_id: str) -> Work:
        """What was done for a request here so far."""
        return self.work.setdefault(task_id, Work())

    def release(self, task_id: str) -> Work:
        """Forget a request; what was done for it here."""
        self.placement.release(task_id)
        return self.work.pop(task_id, Work())

    def _run_group(self, pieces: list[Piece], outcome: Outcome) -> None:
        started = time.perf_counter()
        try:
            with counted() as counts:
                outputs = rows.run(pieces, self._rules(pieces[0].call))
        except Exception as error:
            if len(pieces) > 1 and self._entangled:  # trying again would meet others in the forward that failed
                raise EngineError(f"a forward that ranks and requests share failed: {one_line(error)}") from error
            if len(pieces) > 1:  # find out whose fault it is: the others must not suffer
                for piece in pieces:
                    self._run_group([piece], outcome)
                return
            outcome.errors |= {piece.key: one_line(error) for piece in pieces}
            return
        outcome.outputs.update(zip((p.key for p in pieces), outputs, strict=True))
        self._count(pieces, time.perf_counter() - started, counts)

    def _run_staged(self, stages: Stages, part: list[tuple[list[Piece], bool]], outcome: Outcome) -> None:
        """All forwards at once. An error is that of its row alone: the other stages have run it too."""
        started = time.perf_counter()
        forwards = [functools.partial(rows.run, pieces, self._rules(pieces[0].call)) for pieces, _ in part]
        with counted() as counts:
            results = stages.run_many(forwards, return_exceptions=True)
        seconds = (time.perf_counter() - started) / len(part)
        idle = stages.bubble() * seconds
        for (pieces, is_mine), result in zip(part, results, strict=True):
            if is_mine and isinstance(result, Exception):
                if len(pieces) > 1:
                    raise EngineError(f"a forward that requests share failed: {one_line(result)}") from result
                outcome.errors |= {piece.key: one_line(result) for piece in pieces}
            elif is_mine:
                outcome.outputs.update(zip((piece.key for piece in pieces), result, strict=True))
                self._count(pieces, seconds, Counter(), idle=idle)
        # What was counted cannot be told apart by row: each request gets all of it, once.
        for task_id in dict.fromkeys(piece.call.task_id for pieces, _ in part for piece in pieces):
            self.work_of(task_id).counts.update(counts)

    def _run_for_company(self, pieces: list[Piece]) -> None:
        """Takes part in the collectives of a forward whose result is another rank's; so is its error."""
        with counted() as counts:
            count("company_forwards")
            rows.run_for_company(pieces, self._rules(pieces[0].call))
        for task_id in dict.fromkeys(piece.call.task_id for piece in pieces):
            self.work_of(task_id).counts.update(counts)

    def _count(self, pieces: list[Piece], seconds: float, counts: Counter[str], idle: float = 0.0) -> None:
        """A forward shared by several requests counts for each of them; its seconds are split by rows."""
        total = sum(len(piece.rows) for piece in pieces)
        for task_id in dict.fromkeys(piece.call.task_id for piece in pieces):
            own = sum(len(piece.rows) for piece in pieces if piece.call.task_id == task_id)
            work = self.work_of(task_id)
            work.forwards += 1
            work.rows += own
            work.counts[f"rows_of_{_denoiser(pieces)}"] += own
            work.rows_joined += own if len(pieces) > 1 else 0
            work.seconds += seconds * own / total
            work.idle_seconds += idle * own / total
            work.counts.update(counts)
        for call in dict.fromkeys(piece.call for piece in pieces):
            decided = [(call.target.name, call.branch, decision) for decision in call.decisions]
            self.work_of(call.task_id).decisions += decided
            call.decisions.clear()

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


def _denoiser(pieces: Sequence[Piece]) -> str:
    return pieces[0].call.target.name


def _course(pieces: Sequence[Piece]) -> tuple[str, str]:
    """The denoiser, and what decides which of its blocks run."""
    return _denoiser(pieces), course(pieces[0].call)
