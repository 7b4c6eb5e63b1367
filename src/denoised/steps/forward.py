"""One suspended component call, the thread state it must run under, and which call is running now.

Features that keep state across steps (caches, key/value stores) find it by `running_rows()`: the calls whose rows
are in the forward that runs at this moment, and which rows. State lives in `Call.state`, which belongs to the task and
dies with it.
"""

from __future__ import annotations

import contextlib
import enum
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from denoised.steps.ambient import Ambient
from denoised.steps.deferred import Source, Versions
from denoised.steps.trees import is_idle, objects


class Stage(enum.StrEnum):
    """The three parts of a request's life that a component call belongs to."""

    ENCODE = "encode"
    DENOISE = "denoise"
    DECODE = "decode"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A trapped method of a component: `function` is what ran there before, `name` its component in the pipeline.

    rows_in: the argument that has an entry a row; "": the first.
    stores: arguments that are objects and stay out of use until the pipeline gives them a mode.
    """

    name: str
    method: str
    stage: Stage
    function: Callable[..., Any]
    rows_in: str = ""
    stores: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Active:
    """An adapter that acts in a call: its content, and how strongly."""

    key: str
    scale: float


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What the feature `by` decided for one row of a call: its blocks were computed, or made up from earlier ones.

    step: of the call. values: what was measured for it, if that was asked for.
    """

    by: str
    row: int
    step: int
    computed: bool
    values: tuple[float, ...] = ()


@dataclass(kw_only=True, eq=False)
class Call:
    """One suspended call. `branch` counts the denoiser calls of a task since its last scheduler step; `versions` tell
    whether the program changed an argument in place after it made the call; `adapters` act beside the component's
    layers, so that calls with different ones cannot share a forward. `step` of `num_steps` counts from 0; 0 of 0: the
    program has not told. `decisions` are of the forward that ran last, until somebody takes them."""

    task_id: str
    target: Target
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    branch: int
    ambient: Ambient
    source: Source
    state: dict[str, Any] = field(default_factory=dict)
    versions: Versions | None = None
    adapters: tuple[Active, ...] = ()
    step: int = 0
    num_steps: int = 0
    decisions: list[Decision] = field(default_factory=list)

    def run(self, rows: tuple[int, ...] = ()) -> Any:
        """The call as the program made it: same arguments, same thread state. `rows`: all it has, if it has rows."""
        with self.ambient.restored(), _running(((self, rows),)):
            return self.target.function(*self.args, **self.kwargs)

    def check_arguments(self) -> None:
        """A call that its method cannot take raises where the program made it, as it would without a trap.

        Raises:
            TypeError: unknown or missing arguments.
        """
        _signature(self.target).bind(*self.args, **self.kwargs)

    @cached_property
    def stateful(self) -> bool:
        """Whether an argument is an object that a forward may read and write, as a store of keys and values is.

        Such a call is computed at once, for the program may change the object next; it is not split, and it runs
        where the request's first call ran, for what a forward writes is on that rank only. Decided when the call is
        made, by types and by what the program itself wrote, so that all ranks agree.
        """
        return any(
            not (name in self.target.stores and is_idle(found))
            for name, value in self.named_arguments().items()
            for found in objects(value)
        )

    def lead(self) -> Any:
        """The argument that has an entry a row: latents."""
        named = self.named_arguments()
        return named.get(self.target.rows_in) if self.target.rows_in else next(iter(named.values()), None)

    def named_arguments(self) -> dict[str, Any]:
        """The arguments by parameter name, positional ones included."""
        if not self.args:
            return self.kwargs
        signature = _signature(self.target)
        bound = signature.bind(*self.args, **self.kwargs)
        variadic = [n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD]
        named = dict(bound.arguments)
        for name in variadic:
            named.update(named.pop(name, {}))
        return named


@cache
def _signature(target: Target) -> inspect.Signature:
    return inspect.signature(target.function)


_local = threading.local()


# Some rows of one call.
Part = tuple[Call, tuple[int, ...]]


def running() -> tuple[Call, ...]:
    """The calls whose rows are in the forward that runs now on this thread; empty outside one."""
    return tuple(call for call, _ in running_rows())


def running_rows() -> tuple[Part, ...]:
    """The same with the numbers of the rows, in the order in which they lie in the batch."""
    parts: tuple[Part, ...] = getattr(_local, "parts", ())
    return parts


@contextlib.contextmanager
def _running(parts: tuple[Part, ...]) -> Iterator[None]:
    if running_rows():
        raise AssertionError("component calls do not nest")
    _local.parts = parts
    try:
        yield
    finally:
        _local.parts = ()


@contextlib.contextmanager
def for_company() -> Iterator[None]:
    """Forwards on this thread are run for the collectives in them alone: what they give is another rank's to find."""
    outer = is_company()
    _local.company = True
    try:
        yield
    finally:
        _local.company = outer


def is_company() -> bool:
    """Whether nobody wants what the forward that runs now on this thread gives."""
    found: bool = getattr(_local, "company", False)
    return found


def run_joined(parts: tuple[Part, ...], kwargs: dict[str, Any]) -> Any:
    """One forward over rows of several calls, which share a target and an ambient state."""
    first = parts[0][0]
    with first.ambient.restored(), _running(parts):
        return first.target.function(**kwargs)


class PartedError(Exception):
    """A forward is given up: whoever ran it runs each of `groups` of its rows (positions in the batch) alone.

    Raised by features inside a forward, before it has changed anything, and on all ranks that share it. One group of
    all rows: the same again, now that something is known. In a group without rows this rank keeps those company that
    have some in it.
    """

    def __init__(self, groups: Sequence[tuple[int, ...]]) -> None:
        super().__init__("rows of this forward have to run apart")
        self.groups = groups
