"""Rows under way on one rank: who goes on when, and what is remembered of forwards for those to come."""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from denoised.errors import EngineError
from denoised.features.pipeline.clock import Clock
from denoised.features.pipeline.lane import Lane
from denoised.features.pipeline.layout import Record, signature, tensors
from denoised.features.pipeline.mail import Mail
from denoised.features.pipeline.passage import (
    RUNS,
    Arguments,
    Function,
    Kind,
    OffRecordError,
    Passage,
    Ride,
    Route,
    Scout,
)
from denoised.features.pipeline.plan import Plan, Way
from denoised.steps import collectives
from denoised.steps.tally import count

# Signatures (sizes of pictures and texts) that are remembered; the one used longest ago goes first.
MAX_RECORDS = 256
# Rows that are held at once: some more than stages, or so many. More would only hold more.
MAX_ROWS = 8


def _go_on() -> None:
    """Nothing to do or to wait for."""


@dataclass(frozen=True, kw_only=True)
class Leg:
    """What is known of a forward beside its signature.

    kind: forwards of one kind and signature go one way. early: it goes before others that wait.
    begin, end: called inside the forward, each time that it is tried.
    """

    kind: Any = None
    early: bool = False
    begin: Callable[[], None] = _go_on
    end: Callable[[], None] = _go_on


@dataclass(kw_only=True, eq=False)
class Row:
    """One call of `run_many`.

    lane: what it pauses on; None for a row that runs alone, on the caller's thread, modes and all.
    key: the signature and the kind of the forward that it is in, or stands before. early: as in `Leg`.
    passage: how that forward goes through the stages; None before that is decided.
    astray: the forward took another way than its signature did before.
    home: the stage that has its output.
    """

    number: int
    call: Callable[[], Any]
    lane: Lane | None = None
    key: Any = None
    early: bool = False
    passage: Passage | None = None
    astray: bool = False
    home: int = 0
    output: Any = None
    error: Exception | None = None


class Traffic:
    """The state of forwards under way, and what is known of those to come. Nothing of any request."""

    def __init__(self, route: Route) -> None:
        self.route, self.clock = route, Clock(route.device)
        self._here = threading.local()  # .row: the one that this thread runs; .leg: of its next forward
        self._mails: list[Mail] = []
        self._records: OrderedDict[Any, Way] = OrderedDict()

    # Called by the model.

    def forward(self, function: Function, arguments: Arguments) -> Any:
        row = self._row
        if row is None:
            [output] = self.run_many([lambda: self.forward(function, arguments)])
            return or_raise(output)
        if row.passage is not None:
            raise AssertionError("forwards of one model do not nest")
        self.route.device = _device(arguments) or self.route.device
        self.clock.at(self.route.device)
        leg: Leg = getattr(self._here, "leg", Leg())
        row.key, row.early, row.astray = (signature(*arguments), leg.kind), leg.early, False
        return self._through(row, _within(leg, function), arguments)

    @contextlib.contextmanager
    def leg(self, leg: Leg) -> Iterator[None]:
        """The forward inside, on this thread."""
        self._here.leg = leg
        try:
            yield
        finally:
            del self._here.leg

    def block(self, index: int, function: Function, arguments: Arguments, kind: Kind = RUNS) -> Any:
        count("blocks_run", kind.runs and self.route.is_own(index))
        return self._passage_of(index).block(index, function, arguments, kind)

    def need(self, index: int, used: Sequence[Tensor]) -> None:
        self._passage_of(index).need(index, used)

    def _passage_of(self, index: int) -> Passage:
        row = self._row
        if row is None or row.passage is None:
            raise EngineError(f"{self.route.names[index]} was called outside a forward of its model")
        return row.passage

    @property
    def _row(self) -> Row | None:
        return getattr(self._here, "row", None)

    def _through(self, row: Row, function: Function, arguments: Arguments) -> Any:
        """The forward, and once more if it took another way than the first of its signature."""
        passage = self._passage(row)
        try:
            return passage.run(function, arguments)
        except OffRecordError:
            row.astray = True
        finally:
            row.error, row.passage = row.error or passage.error, None
        return self._through(row, function, arguments)

    def _passage(self, row: Row) -> Passage:
        """How the row's forward goes: it waits until that is decided, or decides itself if it runs alone."""
        if row.lane is not None:
            row.lane.pause()
        else:
            self._decide([row])
        assert row.passage is not None
        return row.passage

    # Running rows.

    def run_many(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """The output of each call, or what it raised."""
        self.clock.start()
        rows = [Row(number=number, call=call) for number, call in enumerate(calls)]
        try:
            for wave in self._waves(rows):
                self._run_wave(wave)
            shared = [self._share(row) for row in rows]
            for mail in self._mails:
                mail.settle_all()
        finally:
            self._mails.clear()
        return [output if row.error is None else row.error for row, output in zip(rows, shared, strict=True)]

    def _waves(self, rows: list[Row]) -> Iterator[list[Row]]:
        """As few as can be, of about equal sizes."""
        most = max(MAX_ROWS, 2 * self.route.size) if self.route.interleaved else 1
        num = -(-len(rows) // most)
        bounds = [len(rows) * index // num for index in range(num + 1)] if rows else []
        return (rows[start:end] for start, end in itertools.pairwise(bounds))

    def _run_wave(self, rows: list[Row]) -> None:
        if len(rows) == 1:
            self._run(rows[0])
            self._check_wire()
            return
        lanes = {row.number: Lane(functools.partial(self._run, row)) for row in rows}
        for row in rows:
            row.lane = lanes[row.number]
        try:
            self._conduct(rows, lanes)
        finally:
            for lane in lanes.values():
                lane.abandon()

    def _run(self, row: Row) -> None:
        """Errors of glue are the same on all ranks, and then there is nothing to share."""
        self._here.row, self.clock.row = row, row.number
        try:
            row.output = row.call()
        except Exception as error:
            row.error = row.error or error
        finally:
            self._here.row = None

    def _conduct(self, rows: list[Row], lanes: dict[int, Lane]) -> None:
        """Bring every row before its forward; then find ways, one by one, and go those that are known, together."""
        steps = [row.number for row in rows]
        while steps:
            for number in steps:
                self.clock.row = number
                lanes[number].advance()
                self._check_wire()
            steps = self._decide([row for row in rows if not lanes[row.number].done])

    def _decide(self, rows: list[Row]) -> list[int]:
        """Give passages to rows that stand before a forward; the numbers of those to go on with, in order.

        Early ones first. All go together if their ways are known; else the first whose way is not goes alone.
        """
        rows = [row for row in rows if row.early] or rows
        lost = next((row for row in rows if row.astray or row.key not in self._records), None)
        if lost is not None:
            lost.passage = Scout(self.route, self.clock, functools.partial(self._learn, lost))
            return [lost.number]
        plan = Plan(ways={row.number: self._records[row.key] for row in rows})
        self._mails.append(Mail(plan.letters(), self.route.group, self.route.device, self.clock))
        for row in rows:
            self._board(row, plan.ways[row.number])
        return plan.steps(self.route.here)

    def _board(self, row: Row, way: Way) -> None:
        self._records.move_to_end(row.key)
        row.home = way.record.home
        pause = row.lane.pause if row.lane is not None else _go_on
        row.passage = Ride(row.number, way, self.route, self.clock, self._mails[-1], pause)

    def _learn(self, row: Row, record: Record) -> None:
        row.home, self._records[row.key] = record.home, self.route.way(record)
        while len(self._records) > MAX_RECORDS:
            self._records.popitem(last=False)
        count("pipeline_scouted")

    def _check_wire(self) -> None:
        """A wire that fails is nobody's row's fault, and leaves none that could go on."""
        for mail in self._mails:
            if mail.failure is not None:
                raise mail.failure

    def _share(self, row: Row) -> Any:
        """The output of the stage that has it, on all."""
        self.clock.row = row.number
        with self.clock.waiting():
            shared = _pytree.tree_map_only(Tensor, functools.partial(self._from, row.home), row.output)
        self.clock.mark("output")
        return shared

    def _from(self, home: int, x: Tensor) -> Tensor:
        """In the layout of `x`: which views of it are possible, and how sums over it round, depends on that."""
        received = collectives.broadcast(x, self.route.group, source=home)
        return received if x.is_contiguous() else torch.empty_like(x).copy_(received)


def or_raise(output: Any) -> Any:
    if isinstance(output, Exception):
        raise output
    return output


def _within(leg: Leg, function: Function) -> Function:
    def forward(*args: Any, **kwargs: Any) -> Any:
        leg.begin()
        output = function(*args, **kwargs)
        leg.end()
        return output

    return forward


def _device(arguments: Arguments) -> torch.device | None:
    """Where a forward runs: weights that are offloaded do not tell, and a time may stay on the CPU."""
    devices = [tensor.device for tensor in tensors(arguments)]
    return next((device for device in devices if device.type != "cpu"), devices[0] if devices else None)
