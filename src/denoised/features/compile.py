"""Blocks whose bodies are compiled: one body a class of block, which all blocks of that class share.

The body is the class's own forward. What is put around a block later (stages, weights that come and go, caches) is
around the body too; what is put inside of it by other features is called from between two graphs, never traced.
An adapter of a request acts inside of layers, so its blocks run as they are written.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from denoised.attention.graphs import compiled, open_lengths
from denoised.attention.intercept import paused
from denoised.errors import InvalidConfigError
from denoised.spec.blocks import Stack, stacks
from denoised.spec.model_spec import ModelSpec
from denoised.steps.forward import running
from denoised.steps.tally import count

# Code that talks to ranks or keeps state of a request: a graph ends before it and another begins behind it.
_UNTRACED = (
    *("denoised.steps", "denoised.attention", "denoised.features.tensor", "denoised.features.sequence"),
    *("denoised.features.cache", "denoised.features.expert", "denoised.features.hsdp"),
)


class Bodies:
    """The compiled bodies of one engine's blocks. `off`: all run as they are written."""

    def __init__(self) -> None:
        self.off = False
        self._by_class: dict[Callable[..., Any], Callable[..., Any]] = {}

    def of(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What is compiled of a forward; the same for all blocks that have it."""
        if function not in self._by_class:
            self._by_class[function] = compiled(function)
        return self._by_class[function]


def has_blocks(model: nn.Module, spec: ModelSpec) -> bool:
    """Whether there is something to compile."""
    return bool(_stacks(model, spec))


def check(model: nn.Module, spec: ModelSpec) -> None:
    """What `apply` refuses, with nothing changed. Raises InvalidConfigError."""
    if not has_blocks(model, spec):
        raise InvalidConfigError(
            f"enforce_eager=False: {type(model).__name__} has no list of blocks to compile; leave it out, and "
            "compile_shapes."
        )


def apply(model: nn.Module, spec: ModelSpec, bodies: Bodies) -> None:
    """Compile the blocks of a denoiser, when they first run. Before whatever stands around blocks."""
    check(model, spec)
    _leave_untraced()
    for stack in _stacks(model, spec):
        for block in stack.blocks:
            block.forward = _forward(block, bodies)
    model.forward = _open(model.forward)


def _stacks(model: nn.Module, spec: ModelSpec) -> tuple[Stack, ...]:
    return stacks(model, spec.stacks)


def _forward(block: nn.Module, bodies: Bodies) -> Callable[..., Any]:
    eager = block.forward
    own = "forward" in vars(block)  # some feature's, of this block alone
    body = bodies.of(eager) if own else functools.partial(bodies.of(type(block).forward), block)

    stand_ins = _StandIns(block)

    @functools.wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if bodies.off or any(call.adapters for call in running()):
            count("eager_blocks")
            return eager(*args, **kwargs)
        count("compiled_blocks")
        with paused(), stand_ins.aside():
            return body(*args, **kwargs)

    return forward


class _StandIns:
    """What stands in for forwards of a block's layers and does nothing without adapters. A graph would hold on to each
    one by itself, and serve one block alone."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block

    @functools.cached_property
    def _places(self) -> list[tuple[dict[str, Any], Any]]:
        """The attributes of the layers, and the stand-ins: found when the block first runs, and all are there."""
        attributes = [vars(layer) for layer in self._block.modules()]
        return [(names, names["forward"]) for names in attributes if _steps_aside(names)]

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        for names, stand_in in self._places:
            if isinstance(stand_in.forward, types.MethodType):
                del names["forward"]  # the class's own
            else:
                names["forward"] = stand_in.forward
        try:
            yield
        finally:
            for names, stand_in in self._places:
                names["forward"] = stand_in


def _steps_aside(names: dict[str, Any]) -> bool:
    return getattr(names.get("forward"), "steps_aside", False) is True


def _open(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with open_lengths():
            return function(*args, **kwargs)

    return forward


@functools.cache
def _leave_untraced() -> None:
    from torch._dynamo import trace_rules

    for name in _UNTRACED:
        trace_rules.add(name)
