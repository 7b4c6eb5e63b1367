"""The rows of a forward, what is remembered of each, and where they lie in its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from denoised.errors import EngineError
from denoised.features.cache.expansion import Expansion
from denoised.features.cache.fitting import fitted
from denoised.features.cache.policy import Past, Step
from denoised.features.cache.trees import Path
from denoised.steps.forward import Call, Part

KEY = "cache"


@dataclass(frozen=True, kw_only=True)
class Visit:
    """A block that was called: what its output looks like, and the input that each of its tensors continues."""

    stack: str
    bare: Any
    continues: dict[Path, Path]


@dataclass(kw_only=True)
class RowState:
    """What a row's request keeps of it from step to step; it dies with the task.

    sign, step: what the call looked like, and when it was; one that looks otherwise, or is earlier, starts anew.
    seen: what the last change is measured from. visits: blocks of the last computed forward.
    kept: by the place of a range's last block and the path in its output.
    fixed, looked, front: what was decided, seen and computed in a forward that was then given up.
    by: the cache with its settings. alone: no other rank has a part of it.
    """

    sign: Any
    step: int
    by: str = ""
    alone: bool = True
    past: Past = field(default_factory=Past)
    seen: list[Tensor] = field(default_factory=list)
    visits: tuple[Visit, ...] = ()
    kept: dict[tuple[int, Path], Expansion] = field(default_factory=dict)
    fixed: tuple[bool, Past] | None = None
    looked: list[Tensor] | None = None
    front: Any = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Unit:
    """Rows that are decided for together: one, or all of a call that cannot be split. first: place in the batch."""

    call: Call
    rows: tuple[int, ...]
    first: int
    state: RowState

    def at(self) -> Step:
        return Step(number=self.call.step, num_steps=self.call.num_steps, possible=bool(self.state.visits))


def units(parts: Sequence[Part], *, by_row: bool, by: str = "", alone: bool = True) -> list[Unit]:
    """The units of a forward. by, alone: as in `RowState`.

    Raises:
        EngineError: a row remembers steps of another cache, or of ranks that shared them otherwise.
    """
    found: list[Unit] = []
    first = 0
    for call, rows in parts:
        for together in [(row,) for row in rows] if by_row else [rows]:
            state = _state(call, together, by, alone)
            found.append(Unit(call=call, rows=together, first=first, state=state))
            first += len(together)
    return found


def _state(call: Call, rows: tuple[int, ...], by: str, alone: bool) -> RowState:
    states: dict[tuple[int, ...], RowState] = call.state.setdefault(KEY, {})
    sign = sorted((name, repr(_sign(value))) for name, value in call.named_arguments().items())
    known = states.get(rows)
    if known is None or known.sign != sign or call.step < known.step:
        states[rows] = RowState(sign=sign, step=call.step, by=by, alone=alone)
    elif (known.by, known.alone) != (by, alone):
        raise EngineError(
            "resume: the checkpoint was made with other settings of the cache, or on one rank where several share a "
            "forward now; start the engine with those that it was made with, or send the request anew"
        )
    return states[rows]


def _sign(value: Any) -> Any:
    """What tells a call from another of its branch: shapes, flags, and numbers in lists, such as those of blocks to
    leave out. Single numbers may differ from step to step."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return {name: _sign(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [part if isinstance(part, int) else _sign(part) for part in value]
    return value if value is None or isinstance(value, bool | str) else type(value).__name__


class Batch:
    """How the rows of a forward lie in its tensors: along the dim of their number, else side by side in dim 0."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows

    def of(self, unit: Unit, tensor: Tensor) -> Tensor:
        """The unit's part, in memory of its own if there are others."""
        if len(unit.rows) == self.num_rows:
            return tensor
        dim, each = self._rows_of(tensor)
        return tensor.narrow(dim, unit.first * each, len(unit.rows) * each).clone()

    def joined(self, parts: Sequence[Tensor], like: Tensor) -> Tensor:
        """All units' parts, in the batch's order, in the shape of `like`."""
        if len(parts) == 1:
            return fitted(parts[0], like.shape)
        dim, _ = self._rows_of(like)
        others = [(*like.shape[:dim], part.shape[dim], *like.shape[dim + 1 :]) for part in parts]
        return torch.cat([fitted(part, shape) for part, shape in zip(parts, others, strict=True)], dim=dim)

    def _rows_of(self, tensor: Tensor) -> tuple[int, int]:
        """The dim of the rows, and entries of each."""
        dim = next((dim for dim, size in enumerate(tensor.shape[:2]) if size == self.num_rows), 0)
        return dim, tensor.shape[dim] // self.num_rows
