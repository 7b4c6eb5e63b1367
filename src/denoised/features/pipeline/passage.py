"""One forward through the stages. Each stage runs the whole model: its own blocks for real, those of other stages as
stand-ins that hand on what their stage sent, or blanks where nothing here depends on them.

Two kinds. The first forward of a signature is a `Scout`: stages take turns, all get every block's output, and watch
where it goes. Those after it are `Ride`s: only what a stage needs is sent to it, and nobody waits for a later stage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from denoised.errors import EngineError
from denoised.features.pipeline.clock import Clock
from denoised.features.pipeline.layout import Event, Record, Shape, fill, outlines, replace, shapes, tensors
from denoised.features.pipeline.watch import Source, Sources, Watch
from denoised.steps import collectives
from denoised.steps.collectives import Group, Posted

Function = Callable[..., Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Route:
    """Who runs what: the blocks' names and stages, and the group, in which rank s is stage s."""

    def __init__(self, *, names: list[str], stages: list[int], group: Group, device: torch.device) -> None:
        self.names, self.stages, self.group, self.device = names, stages, group, device
        self.here, self.size = group.rank(), group.size()

    def is_own(self, block: int) -> bool:
        return self.stages[block] == self.here


class Passage(Protocol):
    error: Exception | None

    def block(self, index: int, function: Function, arguments: Arguments) -> Any:
        """What the block gives, called in the order of the program."""


class OffRecordError(Exception):
    """A forward takes another way than the first of its signature; all stages notice at the same point of it."""


class Ride:
    """A forward whose signature is known.

    error: what a block raised here. The row goes on with blanks, because other stages wait for what it would send;
    whoever started the forward raises it when the row has ended.
    """

    def __init__(self, route: Route, record: Record, clock: Clock, posted: list[Posted]) -> None:
        self._route, self._clock, self._posted = route, clock, posted
        self._events = iter(record)
        self.error: Exception | None = None

    def block(self, index: int, function: Function, arguments: Arguments) -> Any:
        event = next(self._events, None)
        if event is None or event.block != index:
            raise OffRecordError
        if not self._route.is_own(index):
            return fill(event.output, lambda number, shape: self._stand_in(event, number, shape))
        output = self._attempt(event, function, arguments)
        self._send(event, output)
        return output

    def finish(self) -> None:
        """The program has ended: so should the record."""
        if next(self._events, None) is not None:
            raise OffRecordError

    def _stand_in(self, event: Event, number: int, shape: Shape) -> torch.Tensor:
        route = self._route
        if route.here not in event.stages[number]:
            return shape.blank(route.device)
        return collectives.receive(shape.outline(route.device), route.group, source=route.stages[event.block])

    def _attempt(self, event: Event, function: Function, arguments: Arguments) -> Any:
        if self.error is None:
            try:
                return self._run(event, function, arguments)
            except Exception as error:
                self.error = error
        return fill(event.output, lambda _, shape: shape.blank(self._route.device))

    def _run(self, event: Event, function: Function, arguments: Arguments) -> Any:
        with self._clock.busy():
            output = function(*arguments[0], **arguments[1])
        if shapes(tensors(output)) != outlines(event.output):
            raise EngineError(f"{self._route.names[event.block]} gave other shapes than in the first such forward")
        return output

    def _send(self, event: Event, output: Any) -> None:
        for tensor, stages in zip(tensors(output), event.stages, strict=True):
            for stage in sorted(stages):
                self._posted.append(Posted(tensor, self._route.group, to=stage))


class Scout:
    """A forward whose signature is new. An error in a block is raised on all stages."""

    error: Exception | None = None

    def __init__(self, route: Route, clock: Clock) -> None:
        self._route, self._clock = route, clock
        self._calls: list[tuple[int, Any]] = []
        self._users: defaultdict[Source, set[int]] = defaultdict(set)
        self.watch = Watch()

    def block(self, index: int, function: Function, arguments: Arguments) -> Any:
        used = tensors(arguments)
        self._use(self.watch.sources(used), {self._route.stages[index]})
        with _disable_current_modes():
            output = self._run(index, function, arguments, used)
        for number, tensor in enumerate(tensors(output)):
            self.watch.mark(tensor, (len(self._calls) - 1, number))
        return output

    def record(self, output: Any) -> Record:
        """What was learned; `output` is that of the model, which the last stage will give to the others."""
        self._use(self.watch.sources(tensors(output)), {self._route.size - 1})
        self._use(self.watch.decisive, set(range(self._route.size)))
        return tuple(self._event(number) for number in range(len(self._calls)))

    def _event(self, number: int) -> Event:
        block, output = self._calls[number]
        owner = {self._route.stages[block]}
        users = [frozenset(self._users[number, leaf] - owner) for leaf in range(len(outlines(output)))]
        return Event(block=block, output=output, stages=tuple(users))

    def _use(self, sources: Sources, stages: set[int]) -> None:
        for source in sources:
            self._users[source] |= stages

    def _run(self, index: int, function: Function, arguments: Arguments, used: list[torch.Tensor]) -> Any:
        """The block's output, broadcast by its stage: all get tensors of their own, so that none is another's view."""
        route, source = self._route, self._route.stages[index]
        output, problem = self._attempt(index, function, arguments, used) if route.is_own(index) else (None, None)
        outline, problem = self._agree((shapes(output), problem), source)
        if problem:
            raise EngineError(problem)
        self._calls.append((index, outline))
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
