"""Pipeline parallelism of one denoiser: each rank keeps a range of its blocks, rows follow each other through them."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils import _pytree

from denoised.errors import EngineError
from denoised.features.pipeline.clock import Clock, Mark
from denoised.features.pipeline.cut import blocks_of, deal, drop_weights, num_weights
from denoised.features.pipeline.layout import Record, signature, tensors
from denoised.features.pipeline.passage import OffRecordError, Passage, Ride, Route, Scout
from denoised.spec.model_spec import ModelSpec
from denoised.steps import collectives
from denoised.steps.collectives import Posted
from denoised.steps.tally import count

# Signatures (sizes of pictures and texts) that are remembered; the one used longest ago goes first.
MAX_RECORDS = 256


class _Traffic:
    """The state of forwards under way, and what is known of those to come. Nothing of any request."""

    def __init__(self, route: Route) -> None:
        self.route, self.clock = route, Clock(route.device)
        self.passage: Passage | None = None
        self.posted: list[Posted] = []
        self.keep_apart = False  # outputs stay on the last stage until `run_many` shares them
        self._errors: dict[int, Exception] = {}
        self._records: OrderedDict[Any, Record] = OrderedDict()

    def forward(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.keep_apart:
            return self._through(function, args, kwargs)
        [output] = self.run_many([lambda: self._through(function, args, kwargs)])
        return _or_raise(output)

    def run_many(self, calls: Sequence[Callable[[], Any]]) -> list[Any]:
        """The output of each call, or what it raised."""
        self.clock.start()
        self._errors = {}
        with self._delivered(), self._kept_apart():
            outputs = [self._row(number, call) for number, call in enumerate(calls)]
            shared = [self.share(output, row) for row, output in enumerate(outputs)]
        return [self._errors.get(row, output) for row, output in enumerate(shared)]

    def share(self, output: Any, row: int) -> Any:
        """The last stage's output, on all."""
        shared = _pytree.tree_map_only(Tensor, self._from_last, output)
        self.clock.mark("output", row)
        return shared

    def _from_last(self, x: Tensor) -> Tensor:
        """In the layout of `x`: which views of it are possible, and how sums over it round, depends on that."""
        received = collectives.broadcast(x, self.route.group, source=self.route.size - 1)
        return received if x.is_contiguous() else torch.empty_like(x).copy_(received)

    def block(self, index: int, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.passage is None:
            raise EngineError(f"{self.route.names[index]} was called outside a forward of its model")
        count("blocks_run", self.route.is_own(index))
        return self.passage.block(index, function, (args, kwargs))

    def _row(self, number: int, call: Callable[[], Any]) -> Any:
        """Errors of glue are the same on all ranks, and then there is nothing to share."""
        self.clock.row = number
        try:
            return call()
        except Exception as error:
            self._errors[number] = error
            return None

    def _through(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.route.device = self.clock.device = _device(args, kwargs) or self.route.device
        key = signature(args, kwargs)
        if key in self._records:
            with contextlib.suppress(OffRecordError):
                return self._ride(key, function, args, kwargs)
        return self._scout(key, function, args, kwargs)

    def _ride(self, key: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._records.move_to_end(key)
        ride = Ride(self.route, self._records[key], self.clock, self.posted)
        with self._open(ride):
            output = function(*args, **kwargs)
        ride.finish()
        if ride.error is not None:
            self._errors[self.clock.row] = ride.error
        return output

    def _scout(self, key: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        scout = Scout(self.route, self.clock)
        with self._open(scout), scout.watch:
            output = function(*args, **kwargs)
        self._records[key] = scout.record(output)
        while len(self._records) > MAX_RECORDS:
            self._records.popitem(last=False)
        count("pipeline_scouted")
        return output

    @contextlib.contextmanager
    def _open(self, passage: Passage) -> Iterator[None]:
        if self.passage is not None:
            raise AssertionError("forwards of one model do not nest")
        self.passage = passage
        try:
            yield
        finally:
            self.passage = None

    @contextlib.contextmanager
    def _kept_apart(self) -> Iterator[None]:
        self.keep_apart = True
        try:
            yield
        finally:
            self.keep_apart = False

    @contextlib.contextmanager
    def _delivered(self) -> Iterator[None]:
        """What was sent lives until it has arrived."""
        try:
            yield
            for posted in self.posted:
                posted.wait()
        finally:
            self.posted.clear()


@dataclass(frozen=True, kw_only=True)
class Stages:
    """A denoiser cut into stages, seen from one of them.

    stage: which one this rank is, and `num_stages` of how many.
    blocks: names of the blocks that run here; their weights are here and nowhere else.
    """

    stage: int
    num_stages: int
    blocks: tuple[str, ...]
    _traffic: _Traffic = field(repr=False)

    def run_many(self, calls: Sequence[Callable[[], Any]], *, return_exceptions: bool = False) -> list[Any]:
        """Independent forwards of this denoiser, one a call, so that stages overlap; every rank gets all outputs.

        Every rank gives the same calls in the same order. A call may look at its output's shape but not at its
        values, which are right only in what this returns.

        Raises:
            Exception: the first that a call raised, when all have ended; with `return_exceptions` each is returned
                in place of its output. What a block raises in a forward of known shapes is raised on its own stage
                alone: the others get an output of NaN, and have to be told.
        """
        outputs = self._traffic.run_many(calls)
        return outputs if return_exceptions else [_or_raise(output) for output in outputs]

    @property
    def marks(self) -> tuple[Mark, ...]:
        """What happened here, in order, in the last forward or `run_many`."""
        return tuple(self._traffic.clock.marks)

    def bubble(self) -> float:
        """The share of the last forward or `run_many` in which this rank waited; waits for the device."""
        return self._traffic.clock.bubble()


def apply(model: nn.Module, spec: ModelSpec, group: ProcessGroup, *, costs: Sequence[float] | None = None) -> Stages:
    """Cut `model` into one stage a rank of `group`, in place. `costs`: of each block; by default its weights.

    Code outside the lists of blocks runs on every rank.

    Raises:
        InvalidConfigError: the model has no lists of blocks, or fewer blocks than ranks.
    """
    blocks = blocks_of(model, spec, group.size())
    if costs is None:
        costs = [num_weights(block) for block in blocks.values()]
    assert len(costs) == len(blocks), "one cost a block"
    owners = deal(costs, group.size())
    route = Route(names=list(blocks), stages=owners, group=group, device=next(model.parameters()).device)
    traffic = _Traffic(route)
    for index, block in enumerate(blocks.values()):
        if not route.is_own(index):
            drop_weights(block)
        block.forward = _block_forward(traffic, index, block.forward)
    model.forward = _model_forward(traffic, model.forward)
    own = tuple(name for index, name in enumerate(blocks) if route.is_own(index))
    return Stages(stage=route.here, num_stages=route.size, blocks=own, _traffic=traffic)


def _or_raise(output: Any) -> Any:
    if isinstance(output, Exception):
        raise output
    return output


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    """Where a forward runs: weights that are offloaded do not tell, and a time may stay on the CPU."""
    devices = [tensor.device for tensor in tensors((args, kwargs))]
    return next((device for device in devices if device.type != "cpu"), devices[0] if devices else None)


def _block_forward(traffic: _Traffic, index: int, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return traffic.block(index, function, args, kwargs)

    return forward


def _model_forward(traffic: _Traffic, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return traffic.forward(function, args, kwargs)

    return forward
