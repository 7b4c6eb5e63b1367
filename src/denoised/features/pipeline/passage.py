"""One forward through the stages. Each stage runs the whole model: its own blocks for real, those of other stages as
stand-ins that hand on what their stage sent, or blanks where nothing here depends on them.

Two kinds. The first forward of a signature is a `Scout`: stages take turns, all get every block's output, and watch
where it goes. Those after it are `Ride`s: only what a stage needs is sent to it, and nobody waits for a later stage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from denoised.errors import EngineError
from denoised.features.pipeline.clock import Clock
from denoised.features.pipeline.layout import Event, Record, Shape, fill, outlines, replace, shapes, tensors
from denoised.features.pipeline.mail import Mail
from denoised.features.pipeline.order import parts
from denoised.features.pipeline.plan import Key, Way
from denoised.features.pipeline.watch import Source, Sources, Watch
from denoised.steps import collectives
from denoised.steps.collectives import Group
from denoised.steps.forward import PartedError

Function = Callable[..., Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Route:
    """Who runs what: the blocks' names, costs and stages, and the group, in which rank s is stage s."""

    def __init__(
        self,
        *,
        names: list[str],
        costs: Sequence[float],
        stages: Sequence[int],
        group: Group,
        device: torch.device,
    ) -> None:
        self.names, self.costs, self.stages, self.group, self.device = names, costs, stages, group, device
        self.here, self.size = group.rank(), group.size()
        # With one range a stage, rows that follow each other lose nothing, and need not be held at once.
        self.interleaved = len(parts(stages, costs)) > self.size

    def is_own(self, block: int) -> bool:
        return self.stages[block] == self.here

    def way(self, record: Record) -> Way:
        stages = [self.stages[event.block] for event in record.events]
        costs = [self.costs[event.block] if event.runs else 0.0 for event in record.events]
        return Way(record=record, parts=parts(stages, costs))


class Kind(NamedTuple):
    """Of a call of a block. runs: the block itself is computed. for_all: every stage looks at what it gives."""

    runs: bool
    for_all: bool


RUNS = Kind(runs=True, for_all=False)


class Passage(Protocol):
    error: Exception | None

    def run(self, function: Function, arguments: Arguments) -> Any:
        """The forward's output."""

    def block(self, index: int, function: Function, arguments: Arguments, kind: Kind = RUNS) -> Any:
        """What the block gives, or what stands in for it, called in the order of the program."""

    def need(self, index: int, used: Sequence[torch.Tensor]) -> None:
        """The block's stage looks at these tensors, in no block."""


class OffRecordError(Exception):
    """A forward takes another way than the first of its signature; all stages notice at the same point of it."""


class Ride:
    """A forward whose signature is known.

    Whatever happens here, the other stages get the letters that they wait for, with blanks in them.

    pause: called where the row waits for its next turn.
    error: what a block raised here; whoever started the forward raises it when the row has ended.
    """

    def __init__(self, row: int, way: Way, route: Route, clock: Clock, mail: Mail, pause: Callable[[], None]) -> None:
        self._row, self._route, self._clock, self._mail, self._pause = row, route, clock, mail, pause
        self._events, self._pauses = way.record.events, way.pauses(route.here)
        self._turns = frozenset(way.starts)
        self._next = 0
        self.error: Exception | None = None

    def run(self, function: Function, arguments: Arguments) -> Any:
        try:
            output = function(*arguments[0], **arguments[1])
            self._check_end()
        except PartedError:  # as far as it was to go
            self._check_end()
            raise
        except Exception:
            self._keep_promises()
            raise
        return output

    def _check_end(self) -> None:
        if self._next < len(self._events):
            self._keep_promises()
            raise OffRecordError

    def block(self, index: int, function: Function, arguments: Arguments, kind: Kind = RUNS) -> Any:
        if self._next == len(self._events) or not self._is_next(index, kind):
            raise OffRecordError
        return self._event(lambda event: self._attempt(event, function, arguments))

    def need(self, index: int, used: Sequence[torch.Tensor]) -> None:
        """It is in the record who needs what."""

    def _is_next(self, index: int, kind: Kind) -> bool:
        event = self._events[self._next]
        return (event.block, event.runs) == (index, kind.runs)

    def _keep_promises(self) -> None:
        """The rest of the record, with blanks, at the same points of the order."""
        while self._next < len(self._events) and self._mail.failure is None:
            self._event(self._blanks)

    def _event(self, own: Callable[[Event], Any]) -> Any:
        number = self._next
        if number in self._pauses:
            self._pause()
        self._next, event = number + 1, self._events[number]
        if not self._route.is_own(event.block):
            return fill(event.output, lambda leaf, shape: self._stand_in(Key(self._row, number, leaf), shape))
        if number in self._turns:
            self._mail.settle(self._row)
        output = own(event)
        self._send(number, output)
        return output

    def _stand_in(self, key: Key, shape: Shape) -> torch.Tensor:
        if self._route.here not in self._events[key.event].stages[key.leaf]:
            return shape.blank(self._route.device)
        return self._mail.take(key)

    def _attempt(self, event: Event, function: Function, arguments: Arguments) -> Any:
        if self.error is None:
            try:
                return self._run(event, function, arguments)
            except Exception as error:
                self.error = error
        return self._blanks(event)

    def _blanks(self, event: Event) -> Any:
        return fill(event.output, lambda _, shape: shape.blank(self._route.device))

    def _run(self, event: Event, function: Function, arguments: Arguments) -> Any:
        with self._clock.busy():
            output = function(*arguments[0], **arguments[1])
        if shapes(tensors(output)) != outlines(event.output):
            raise EngineError(f"{self._route.names[event.block]} gave other shapes than in the first such forward")
        return output

    def _send(self, number: int, output: Any) -> None:
        leaves = zip(tensors(output), self._events[number].stages, strict=True)
        for leaf, (tensor, stages) in enumerate(leaves):
            for stage in sorted(stages):
                self._mail.send(Key(self._row, number, leaf), stage, tensor)


class Scout:
    """A forward whose signature is new. An error in a block is raised on all stages.

    learned: gets what was found out.
    """

    error: Exception | None = None

    def __init__(self, route: Route, clock: Clock, learned: Callable[[Record], None]) -> None:
        self._route, self._clock, self._learned = route, clock, learned
        self._calls: list[tuple[int, Any, bool]] = []
        self._users: defaultdict[Source, set[int]] = defaultdict(set)
        self._watch = Watch()

    def run(self, function: Function, arguments: Arguments) -> Any:
        with self._watch:
            try:
                output = function(*arguments[0], **arguments[1])
            except PartedError:
                self._learned(self._record(None))
                raise
        self._learned(self._record(output))
        return output

    def block(self, index: int, function: Function, arguments: Arguments, kind: Kind = RUNS) -> Any:
        used = tensors(arguments)
        self.need(index, used)
        with _disable_current_modes():
            output = self._run(index, function, arguments, used, kind)
        for number, tensor in enumerate(tensors(output)):
            self._watch.mark(tensor, (len(self._calls) - 1, number))
            if kind.for_all:
                self._users[len(self._calls) - 1, number] |= set(range(self._route.size))
        return output

    def need(self, index: int, used: Sequence[torch.Tensor]) -> None:
        self._use(self._watch.sources(used), {self._route.stages[index]})

    def _record(self, output: Any) -> Record:
        """What was learned; `output` is that of the model, which the stage of the last block gives to the others."""
        home = self._route.stages[self._calls[-1][0]] if self._calls else 0
        self._use(self._watch.sources(tensors(output)), {home})
        self._use(self._watch.decisive, set(range(self._route.size)))
        return Record(events=tuple(self._event(number) for number in range(len(self._calls))), home=home)

    def _event(self, number: int) -> Event:
        block, output, runs = self._calls[number]
        owner = {self._route.stages[block]}
        users = [frozenset(self._users[number, leaf] - owner) for leaf in range(len(outlines(output)))]
        return Event(block=block, output=output, stages=tuple(users), runs=runs)

    def _use(self, sources: Sources, stages: set[int]) -> None:
        for source in sources:
            self._users[source] |= stages

    def _run(self, index: int, function: Function, arguments: Arguments, used: list[torch.Tensor], kind: Kind) -> Any:
        """The block's output, broadcast by its stage: all get tensors of their own, so that none is another's view."""
        route, source = self._route, self._route.stages[index]
        output, problem = self._attempt(index, function, arguments, used) if route.is_own(index) else (None, None)
        with self._clock.waiting():
            outline, problem = self._agree((shapes(output), problem), source)
        if problem:
            raise EngineError(problem)
        self._calls.append((index, outline, kind.runs))
        mine = output if route.is_own(index) else fill(outline, lambda _, shape: shape.outline(route.device))
        return replace(mine, [collectives.broadcast(x, route.group, source=source) for x in tensors(mine)])

    def _attempt(
        self, index: int, function: Function, arguments: Arguments, used: list[torch.Tensor]
    ) -> tuple[Any, str | None]:
        before = [_version(tensor) for tensor in used]
        try:
            with self._clock.busy():
                output = function(*arguments[0], **arguments[1])
        except Exception as error:
            return None, f"{self._route.names[index]}: {type(error).__name__}: {error}"
        if before != [_version(tensor) for tensor in used]:
            return None, (
                f"pipeline_parallel_size={self._route.size}: {self._route.names[index]} changes its input in place, "
                "which other stages would not see; use pipeline_parallel_size=1."
            )
        return output, None

    def _agree(self, mine: Any, source: int) -> Any:
        box = [mine]
        dist.broadcast_object_list(box, group=self._route.group, group_src=source, device=self._route.device)
        return box[0]


def _version(tensor: torch.Tensor) -> int:
    """Grows with each change in place; not counted in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
