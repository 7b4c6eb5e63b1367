"""Pipeline parallelism of one denoiser: each rank keeps ranges of its blocks, and goes from row to row with them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from denoised.features.pipeline.clock import Mark
from denoised.features.pipeline.cut import MAX_ROUNDS, blocks_of, deal, drop_weights, num_weights
from denoised.features.pipeline.passage import Kind, Route
from denoised.features.pipeline.traffic import Leg, Traffic, or_raise
from denoised.spec.model_spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Stages:
    """A denoiser cut into stages, seen from one of them.

    stage: which one this rank is, and `num_stages` of how many.
    blocks: names of the blocks that run here; their weights are here and nowhere else.
    """

    stage: int
    num_stages: int
    blocks: tuple[str, ...]
    _traffic: Traffic = field(repr=False)
    _bodies: dict[int, tuple[int, Callable[..., Any]]] = field(repr=False)

    def run_many(self, calls: Sequence[Callable[[], Any]], *, return_exceptions: bool = False) -> list[Any]:
        """Independent forwards of this denoiser, one a call, so that stages overlap; every rank gets all outputs.

        Every rank gives the same calls in the same order. A call may look at its output's shape but not at its
        values, which are right only in what this returns. Calls may run on threads of their own, one at a time.

        Raises:
            Exception: the first that a call raised, when all have ended; with `return_exceptions` each is returned
                in place of its output. What a block raises in a forward of known shapes is raised on its own stage
                alone: the others get an output of NaN, and have to be told.
        """
        outputs = self._traffic.run_many(calls)
        return outputs if return_exceptions else [or_raise(output) for output in outputs]

    # For whoever stands in for blocks. Every stage makes the same calls, in the same order.

    def leg(
        self, kind: Any, *, early: bool, begin: Callable[[], None], end: Callable[[], None]
    ) -> AbstractContextManager[None]:
        """The forward inside, on this thread, is of this kind: those of one kind and signature call the same blocks.

        Args:
            early: it goes before others that wait, however long they have.
            begin, end: called inside the forward at either end, each time that it is tried.
        """
        return self._traffic.leg(Leg(kind=kind, early=early, begin=begin, end=end))

    def stand_in(self, block: nn.Module, function: Callable[[], Any], used: Sequence[Tensor], *, for_all: bool) -> Any:
        """In a forward, what `function` gives at the block's stage, for whoever needs it, as if it were its output.

        Args:
            used: the tensors that it looks at.
            for_all: all stages look at what it gives, so that they know what to do next.
        """
        index, _ = self._bodies[id(block)]
        kind = Kind(runs=False, for_all=for_all)
        return self._traffic.block(index, lambda *_: function(), (tuple(used), {}), kind)

    def need(self, block: nn.Module, used: Sequence[Tensor]) -> None:
        """In a forward, the block's stage looks at these tensors."""
        self._traffic.need(self._bodies[id(block)][0], used)

    def owns(self, block: nn.Module) -> bool:
        """Whether the block runs here."""
        return self._traffic.route.is_own(self._bodies[id(block)][0])

    def body(self, block: nn.Module) -> Callable[..., Any]:
        """The forward that the block had before the model was cut; only its own stage has weights for it."""
        return self._bodies[id(block)][1]

    @property
    def marks(self) -> tuple[Mark, ...]:
        """What happened here, in order, in the last forward or `run_many`."""
        return tuple(self._traffic.clock.marks)

    def bubble(self) -> float:
        """The share of the last forward or `run_many` in which this rank waited; waits for the device."""
        return self._traffic.clock.bubble()


def apply(
    model: nn.Module,
    spec: ModelSpec,
    group: ProcessGroup,
    *,
    costs: Sequence[float] | None = None,
    max_rounds: int = MAX_ROUNDS,
) -> Stages:
    """Cut `model` into one stage a rank of `group`, in place.

    Code outside the lists of blocks runs on every rank.

    Args:
        costs: of each block; by default its weights.
        max_rounds: ranges of blocks that a stage may have. With 1, forwards run one after the other on each rank, as
            they must where something is open while one runs (weights that are gathered).

    Raises:
        InvalidConfigError: the model has no lists of blocks, or fewer blocks than ranks.
    """
    blocks = blocks_of(model, spec, group.size())
    costs = tuple(costs or [num_weights(block) for block in blocks.values()])
    assert len(costs) == len(blocks), "one cost a block"
    owners = deal(costs, group.size(), max_rounds)
    device = next(model.parameters()).device
    route = Route(names=list(blocks), costs=costs, stages=owners, group=group, device=device)
    traffic = Traffic(route)
    bodies = {id(block): (index, block.forward) for index, block in enumerate(blocks.values())}
    for index, block in enumerate(blocks.values()):
        if not route.is_own(index):
            drop_weights(block)
        block.forward = _block_forward(traffic, index, block.forward)
    model.forward = _model_forward(traffic, model.forward)
    own = tuple(name for index, name in enumerate(blocks) if route.is_own(index))
    return Stages(stage=route.here, num_stages=route.size, blocks=own, _traffic=traffic, _bodies=bodies)


def _block_forward(traffic: Traffic, index: int, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return traffic.block(index, function, (args, kwargs))

    return forward


def _model_forward(traffic: Traffic, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return traffic.forward(function, (args, kwargs))

    return forward
