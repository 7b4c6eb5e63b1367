"""A program again, without what it computed: its denoiser calls give tensors of which only the shape is known, its
scheduler's steps the results that were kept, up to the iteration where it was left. From there on all is as it was.

Scheduler steps are run, so that whatever a scheduler makes on its way is there; their results, and the state that they
left, are then put in place. Everything else of the program runs for real and gives what it gave, for it is the same
program with the same seed.

A program that needs a value that was not kept is unwound (`NeedsValue`); whoever started it then runs it from the
start, which is slower and never wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from denoised.steps.packing import Json, Packed, UnpackableError, pack, same
from denoised.steps.unknown import Guess, NeedsValue, Unknown, known, stripped, unknown, with_items


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a denoiser call gave, without its values.

    branch: which call of its iteration it was. writes: it changed an object among its arguments, as a store of keys
    and values is, so that it must be made again.
    """

    name: str
    branch: int
    skeleton: Json
    shapes: tuple[tuple[tuple[int, ...], torch.dtype, str], ...]
    writes: bool = False

    def open(self, device: torch.device, kind: type[Unknown] = Unknown) -> Any:
        tensors: list[torch.Tensor] = [
            unknown(shape, dtype, "cpu" if on == "cpu" else device, kind) for shape, dtype, on in self.shapes
        ]
        return Packed(skeleton=self.skeleton, tensors=tensors).unpack()


@dataclass(frozen=True, kw_only=True)
class StepState:
    """Where a scheduler's step left what goes on: its scheduler's attributes, the request's generator, and torch's."""

    scheduler: dict[str, Packed]
    generators: list[torch.Tensor]
    random: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Past:
    """A program up to the end of an iteration, as far as it is needed to go on.

    results: tensors of what steps gave, by the step's number from 1: of the last iteration, of every scheduler's last
    step, and of the last before it was given new timesteps, which nobody else could bring back.
    states: of the last iteration's steps. clean: their predicted clean samples.
    """

    iteration: int
    num_steps: int
    predictions: list[Prediction] = field(default_factory=list)
    results: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    states: dict[int, StepState] = field(default_factory=dict)
    clean: dict[int, torch.Tensor] = field(default_factory=dict)


class Replay:
    """Answers a program's calls from its past.

    to_clean: do not go on where it was left, but run to the end without the denoiser: the last iteration's steps give
        the clean samples that they predicted, later steps what they are given.
    """

    def __init__(self, past: Past, *, device: torch.device, to_clean: bool = False) -> None:
        self.past, self._device, self._to_clean = past, device, to_clean
        self.num_steps = self._num_predictions = 0
        self.generators: list[torch.Generator] = []
        self._kind = Guess if to_clean else Unknown
        self._latest = {(p.name, p.branch): p for p in past.predictions}

    @property
    def active(self) -> bool:
        """Whether denoiser calls are answered here."""
        return self._to_clean or self.num_steps < self.past.num_steps

    def open(self, prediction: Prediction) -> Any:
        """In place of a denoiser call's result."""
        return prediction.open(self._device, self._kind)

    def next_prediction(self, name: str, branch: int) -> Prediction:
        """What is known of the next denoiser call's result.

        Raises:
            NeedsValue: the program makes another call than it did.
        """
        number, self._num_predictions = self._num_predictions, self._num_predictions + 1
        if number < len(self.past.predictions):
            found = self.past.predictions[number]
            if (found.name, found.branch) != (name, branch):
                raise NeedsValue(f"the pipeline makes another call of its {name} than it did")
            return found
        # A call that was never made gives what its like gave, or its like of another denoiser.
        return self._latest.get((name, branch), self.past.predictions[-1])

    def step(self, scheduler: Any, run: Callable[..., Any], given: dict[str, Any]) -> Any:
        """In place of `run(**given)`, a scheduler's step."""
        is_over = not self.active
        self.num_steps += 1
        if is_over:
            result = run(**known(given))
            _check(result)
            return result
        sample = given.get("sample")
        if self.num_steps > self.past.num_steps:  # nobody knows the shape of predictions that were never made
            given = given | {"model_output": sample}
        result = run(**stripped(given))
        if (state := self.past.states.get(self.num_steps)) is not None and not self._to_clean:
            self._restore(scheduler, state)
        return self._result(result, sample)

    def _result(self, result: Any, sample: Any) -> Any:
        if self._to_clean and self.num_steps in self.past.clean:
            return _like(result, self.past.clean[self.num_steps])
        if self.num_steps in self.past.results:
            return _replaced(result, self.past.results[self.num_steps])
        return _like(result, sample if self.num_steps > self.past.num_steps else None, self._kind)

    def _restore(self, scheduler: Any, state: StepState) -> None:
        for name, packed in state.scheduler.items():
            if not _is_equal(scheduler.__dict__.get(name), packed):
                scheduler.__dict__[name] = packed.unpack(device=self._device)
        for generator, value in zip(self.generators, state.generators, strict=True):
            generator.set_state(value)
        torch.set_rng_state(state.random)


def leaves(result: Any) -> list[torch.Tensor]:
    """The tensors of what a step gave, in order."""
    values = result.values() if isinstance(result, dict) else result
    return [value for value in values if isinstance(value, torch.Tensor)]


def _is_equal(value: Any, packed: Packed) -> bool:
    try:
        return same(pack(value, copy=False), packed)
    except UnpackableError:
        return False


def _check(result: Any) -> None:
    """A step whose arguments are known gives what is known, unless its scheduler remembers something that is not."""
    if any(leaf.is_floating_point() and torch.isnan(leaf).any() for leaf in leaves(result)):
        raise NeedsValue("the scheduler needs a prediction of a step that was not run again")


def _replaced(result: Any, tensors: list[torch.Tensor]) -> Any:
    """`result` with these tensors, in order, in place of its own."""
    own = leaves(result)
    if [leaf.shape for leaf in own] != [tensor.shape for tensor in tensors]:
        raise NeedsValue("a step gives another shape than it did")
    queue = [tensor.to(device=leaf.device, copy=True) for leaf, tensor in zip(own, tensors, strict=True)]
    return _mapped(result, lambda _: queue.pop(0))


def _like(result: Any, value: Any, kind: type[Unknown] = Unknown) -> Any:
    """`result` with `value` in place of each of its tensors; open where it has another shape, or is None."""

    def replaced(leaf: torch.Tensor) -> torch.Tensor:
        if isinstance(value, torch.Tensor) and value.shape == leaf.shape:
            return value.to(device=leaf.device, dtype=leaf.dtype, copy=True)
        return unknown(tuple(leaf.shape), leaf.dtype, leaf.device, kind)

    return _mapped(result, replaced)


def _mapped(result: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`function` of the tensors of a tuple or an output class."""
    if isinstance(result, dict):
        return with_items(result, {k: function(v) for k, v in result.items() if isinstance(v, torch.Tensor)})
    return type(result)(function(item) if isinstance(item, torch.Tensor) else item for item in result)
