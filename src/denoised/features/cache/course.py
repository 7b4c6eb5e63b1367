"""What a computed forward shows of its blocks: how their outputs continue their inputs, and what each range added.

Tensors are held only as long as somebody needs them: the inputs of a range, and its last outputs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from denoised.errors import EngineError
from denoised.features.cache.rows import Visit
from denoised.features.cache.trees import Leaves, Path, leaves, places, skeleton

# What blocks call the tensor that the noise is in; where none is called so, all floating-point arguments are it.
MAIN = ("hidden_states", "x")


@dataclass(frozen=True, kw_only=True)
class BlockCall:
    """A block about to run.

    run: as the model would have it. body: the block itself, where it is run on this rank and by nobody's leave.
    named: its arguments, by parameter. attend: takes part in the gathers of its weights, and no more.
    """

    stack: str
    block: Any
    run: Callable[[], Any]
    named: dict[str, Any]
    body: Callable[[], Any]
    attend: Callable[[], None]

    @property
    def device(self) -> torch.device:
        return next(iter(self.inputs.values())).device

    @cached_property
    def inputs(self) -> Leaves:
        """The tensors of its arguments. Found when somebody asks: of most skipped blocks nobody does."""
        return leaves(self.named)

    def main(self) -> Leaves:
        """The inputs that the noise is in."""
        return main(self.inputs)


def main(inputs: Leaves) -> Leaves:
    """Of tensors by path those that the noise is in."""
    named = {path: tensor for path, tensor in inputs.items() if path[0] in MAIN}
    return named or {p: t for p, t in inputs.items() if len(p) == 1 and t.is_floating_point()}


@dataclass(kw_only=True)
class _Range:
    """Blocks of one stack that follow each other: places `start` to `end`. outputs: of the last ones, newest last."""

    start: int
    end: int
    first: BlockCall
    outputs: deque[Leaves]


@dataclass(frozen=True, kw_only=True)
class Added:
    """What a range of blocks added to one tensor: the range's last block, and the path in its output.

    after, before: the range's output, and the input that it continues, if it does one.
    """

    place: int
    path: Path
    after: Tensor
    before: Tensor | None

    @cached_property
    def value(self) -> Tensor:
        return self.after if self.before is None else self.after - self.before


@dataclass(kw_only=True)
class Course:
    """A forward being computed. first, last: blocks at either end that are in no range."""

    first: int
    last: int
    _seen: list[tuple[str, Any, dict[Path, list[Path]]]] = field(default_factory=list)
    _ranges: list[_Range] = field(default_factory=list)
    _flows: dict[str, dict[Path, Path]] = field(default_factory=dict)
    _versions: list[tuple[Tensor, int]] = field(default_factory=list)

    def run(self, call: BlockCall) -> Any:
        """The block's output."""
        self._flows.setdefault(call.stack, {}).update(self._flow_into(call))
        part = self._range_of(call)
        output = call.run()
        given = leaves(output)
        part.outputs.append(given)
        part.end += 1
        likely = {path: _alike(tensor, call.inputs) for path, tensor in given.items()}
        self._seen.append((call.stack, skeleton(output), likely))
        return output

    def added_before(self, call: BlockCall) -> list[Tensor]:
        """What the blocks before `call` added to the tensors that the noise is in, in the last one's stack."""
        part = self._ranges[-1]
        given, start = part.outputs[-1], part.first.main()
        flows = self._flows[part.first.stack] | self._flow_into(call)
        pairs = [(given[out], start[came]) for out, came in flows.items() if out in given and came in start]
        pairs = pairs or [(after, base) for after in given.values() for base in start.values()]
        return [after - base for after, base in pairs if after.shape == base.shape]

    def visits(self) -> tuple[Visit, ...]:
        """The blocks that were called, in order.

        Raises:
            EngineError: one cannot be skipped, because nobody could say what it gives.
        """
        found = tuple(self._visit(*seen) for seen in self._seen)
        for part, end in self._within():
            for visit in found[part.start : end - 1]:
                _check_skippable(visit)
        return found

    def added(self, visits: tuple[Visit, ...]) -> Iterator[Added]:
        """For each range what it added to each tensor of its last block's output; one that continues no input, whole.

        Raises:
            EngineError: a block's input was changed in place.
        """
        if any(_version(tensor) != before for tensor, before in self._versions):
            raise EngineError(
                "cache_backend: the model changes the input of a block in place, so nobody knows what its blocks add; "
                "leave cache_backend out"
            )
        for part, end in self._within():
            for path, tensor in part.outputs[end - 1 - part.end].items():
                came = visits[end - 1].continues.get(path)
                before = None if came is None else part.first.inputs[came]
                yield Added(place=end - 1, path=path, after=tensor, before=before)

    def _within(self) -> list[tuple[_Range, int]]:
        """The ranges that may be skipped, and their ends: without the blocks at either end of the forward."""
        ends = [(part, min(part.end, len(self._seen) - self.last)) for part in self._ranges]
        return [(part, end) for part, end in ends if self.first <= part.start < end]

    def _range_of(self, call: BlockCall) -> _Range:
        place = len(self._seen)
        if not self._ranges or self._ranges[-1].first.stack != call.stack or place == self.first:
            outputs: deque[Leaves] = deque(maxlen=self.last + 1)
            self._ranges.append(_Range(start=place, end=place, first=call, outputs=outputs))
            self._versions += [(tensor, _version(tensor)) for tensor in call.inputs.values()]
        return self._ranges[-1]

    def _flow_into(self, call: BlockCall) -> dict[Path, Path]:
        """Which output of the block before, if it is of the same stack, is which input of this one."""
        if not self._ranges or self._ranges[-1].first.stack != call.stack:
            return {}
        names = {id(tensor): path for path, tensor in call.inputs.items()}
        given = self._ranges[-1].outputs[-1]
        return {path: names[id(tensor)] for path, tensor in given.items() if id(tensor) in names}

    def _visit(self, stack: str, bare: Any, likely: dict[Path, list[Path]]) -> Visit:
        flows, continues = self._flows[stack], dict[Path, Path]()
        for path, names in likely.items():
            free = [name for name in names if name not in continues.values() and name not in flows.values()]
            name = flows[path] if flows.get(path) in names else next(iter(free), None)
            if name is not None:
                continues[path] = name
        return Visit(stack=stack, bare=bare, continues=continues)


def _alike(tensor: Tensor, inputs: Leaves) -> list[Path]:
    """Inputs of its shape, those that the noise is in first."""
    found = [path for path, other in inputs.items() if other.shape == tensor.shape and other.dtype == tensor.dtype]
    return sorted(found, key=lambda path: path[0] not in MAIN)


def _check_skippable(visit: Visit) -> None:
    if len(visit.continues) < len(places(visit.bare)):
        raise EngineError(
            f"cache_backend: blocks of {visit.stack} give a tensor that continues none of their inputs, so they "
            "cannot be skipped; name the stack in ModelSpec.uncached, or leave cache_backend out"
        )


def _version(tensor: Tensor) -> int:
    """Grows with each change in place; not counted in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
