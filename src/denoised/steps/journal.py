"""What a program has done so far, as far as it is needed to run it again without its denoiser (`replay.py`).

One per request, shared by all copies of its scheduler. An iteration is a round of denoiser calls and the scheduler
steps that follow them; it is complete when the program asks for the next prediction, for what is between may still
change what the steps gave.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from denoised.steps.clean import clean_sample
from denoised.steps.forward import Call
from denoised.steps.packing import Packed, UnpackableError, pack
from denoised.steps.replay import Past, Prediction, Replay, StepState, leaves
from denoised.steps.trees import objects
from denoised.steps.unknown import Unknown, known


@dataclass(kw_only=True)
class _Step:
    """One scheduler step. `results`: None if it was not run and nothing of it was kept."""

    number: int
    results: list[torch.Tensor] | None
    state: StepState | None
    clean: torch.Tensor | None


@dataclass(kw_only=True)
class _Series:
    """Steps of one scheduler since it was given its timesteps."""

    timesteps: Any
    last: _Step


@dataclass(kw_only=True)
class Journal:
    """Records one program, and answers its calls as long as it is replayed.

    every: iterations between states that one can go on from; 0: none are kept.
    shows: clean samples are kept, for previews.
    keeps_all: the result of every step is needed.
    sees_all: all forwards of this request run here, so that it can be seen what they change.
    replay: what the program is answered from; None if it runs for the first time.
    """

    every: int = 0
    shows: bool = False
    keeps_all: bool = False
    sees_all: bool = True
    replay: Replay | None = None
    generators: list[torch.Generator] = field(default_factory=list)
    iteration: int = 0
    problem: str = ""
    _num_steps: int = 0
    _asked: bool = True
    _stores: dict[Call, Any] = field(default_factory=dict)
    _predictions: list[Prediction] = field(default_factory=list)
    _current: list[_Step] = field(default_factory=list)
    _series: dict[int, tuple[Any, _Series]] = field(default_factory=dict)
    _kept: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    @property
    def replays(self) -> bool:
        """Whether denoiser calls are answered from the past."""
        return self.replay is not None and self.replay.active

    @property
    def is_between(self) -> bool:
        """Whether an iteration is complete, and the next has begun: this moment can be told by `past`."""
        return self._asked and self._num_steps > 0 and not self.replays and not self.problem

    # ---- on the task's thread

    def arguments(self, value: Any) -> Any:
        """A component call's arguments, which must be known."""
        return value if self.replay is None else known(value)

    def ask(self, call: Call) -> Any:
        """The program makes a denoiser call; its answer if it is replayed, else None."""
        self._asked = True
        if call.stateful:
            self._stores[call] = _contents(call.named_arguments())
        if self.replay is None or not self.replay.active:
            return None
        found = self.replay.next_prediction(call.target.name, call.branch)
        if found.writes:
            return None
        self._stores.pop(call, None)
        self._predictions.append(found)
        return self.replay.open(found)

    def step(self, scheduler: Any, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`run(*args, **kwargs)`, a step of this scheduler, or what it gave in the past."""
        if self._asked:
            self._asked, self._current, self.iteration = False, [], self.iteration + 1
        self._num_steps += 1
        given = _named(type(scheduler), args, kwargs)
        if self.replay is None:
            result = run(*args, **kwargs)
        else:
            self.replay.generators = self.generators
            result = self.replay.step(scheduler, run, given)
        if not self.problem:
            self._note(scheduler, given, leaves(result))
        return result

    def _note(self, scheduler: Any, given: dict[str, Any], found: list[torch.Tensor]) -> None:
        is_open = any(isinstance(leaf, Unknown) for leaf in found)
        step = _Step(
            number=self._num_steps,
            results=None if is_open else [leaf.detach().clone() for leaf in found],
            state=self._state(scheduler) if self.every and self.iteration % self.every == 0 else None,
            clean=clean_sample(scheduler, given, found).detach().clone() if self.shows and not is_open else None,
        )
        self._current.append(step)
        timesteps = getattr(scheduler, "timesteps", None)
        before = self._series.get(id(scheduler))
        if before is not None and (self.keeps_all or before[1].timesteps is not timesteps):
            self._keep(before[1].last)
        # The scheduler is held, so that no other can have its id.
        self._series[id(scheduler)] = scheduler, _Series(timesteps=timesteps, last=step)

    def _keep(self, step: _Step) -> None:
        if step.results is not None:
            self._kept[step.number] = step.results

    def _state(self, scheduler: Any) -> StepState:
        return StepState(
            scheduler=_attributes(scheduler),
            generators=[generator.get_state() for generator in self.generators],
            random=torch.get_rng_state(),
        )

    # ---- on the engine's thread, while the task is stopped

    def learn(self, call: Call, value: Any) -> None:
        """Remember the shape of what a denoiser call gave."""
        if self.problem:
            return
        try:
            packed = pack(value, copy=False)
        except UnpackableError as error:
            self.problem = f"{call.target.name}: {error}"
            return
        shapes = tuple((tuple(t.shape), t.dtype, t.device.type) for t in packed.tensors)
        self._predictions.append(
            Prediction(
                name=call.target.name,
                branch=call.branch,
                skeleton=packed.skeleton,
                shapes=shapes,
                writes=self._writes(call),
            )
        )

    def _writes(self, call: Call) -> bool:
        before = self._stores.pop(call, None)
        return before is not None and not (self.sees_all and before == _contents(call.named_arguments()))

    def past(self) -> Past:
        """All that is needed to go on from here: when `is_between` has just become true."""
        assert self.is_between, "an iteration is not complete"
        steps = [*(series.last for _, series in self._series.values()), *self._current]
        kept = {step.number: step.results for step in steps if step.results is not None}
        return Past(
            iteration=self.iteration,
            num_steps=self._num_steps,
            predictions=list(self._predictions),
            results={**self._kept, **kept},
            states={step.number: step.state for step in self._current if step.state is not None},
            clean={step.number: step.clean for step in self._current if step.clean is not None},
        )


class _Seen:
    """A tensor in one version. It is held, so that no other can come to be in its place."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version = tensor, None if tensor.is_inference() else tensor._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Seen) and self._tensor is other._tensor and self._version == other._version

    __hash__ = None  # type: ignore[assignment]


def _contents(value: Any) -> Any:
    """What the objects among some arguments hold: which tensors, in which version, and plain values."""
    if isinstance(value, torch.Tensor):
        return _Seen(value)
    if isinstance(value, list | tuple):
        return [_contents(item) for item in value]
    if isinstance(value, dict):
        return {key: _contents(item) for key, item in value.items()}
    return [_contents(vars(found)) for found in objects(value)] or repr(value)


def _attributes(scheduler: Any) -> dict[str, Packed]:
    """A scheduler's attributes that can be kept; the others, such as its configuration, come with it."""
    found = {}
    for name, value in scheduler.__dict__.items():
        try:
            found[name] = pack(value)
        except UnpackableError:
            continue
    return found


@cache
def _parameters(scheduler_class: type) -> tuple[str, ...]:
    return tuple(inspect.signature(scheduler_class.step).parameters)[1:]  # type: ignore[attr-defined]


def _named(scheduler_class: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A step's arguments by name."""
    return {**dict(zip(_parameters(scheduler_class), args, strict=False)), **kwargs}
