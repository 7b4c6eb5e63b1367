"""What is known of a call's output before it is computed: learned from an earlier call of the same kind.

It lets a program unpack a prediction, or ask for its dtype, and run on. What it was told is checked when the value is
there, so a wrong guess is an error and never a wrong result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Outline:
    """One value: a tuple, a list, a tensor, or None.

    parts: of a tuple, what each part is (None: unknown); None: it is no tuple, or not always of one length.
    item: what each entry of a list is, whose length differs from call to call.
    nothing: the value is None.
    dtype, device: of a tensor.
    """

    parts: tuple[Outline | None, ...] | None = None
    item: Outline | None = None
    nothing: bool = False
    dtype: torch.dtype | None = None
    device: torch.device | None = None

    def part(self, index: int) -> Outline | None:
        return self.item if self.parts is None else self.parts[index]


def of_length(arity: int | Outline | None) -> Outline | None:
    """The outline of a tuple of `arity` unknown parts; an outline as it is."""
    return Outline(parts=(None,) * arity) if isinstance(arity, int) else arity


def of_output(value: Any) -> Outline | None:
    """The outline of a call's output; None where there is nothing to say."""
    return Outline(parts=tuple(map(_inner, value))) if isinstance(value, list | tuple) else None


def _inner(value: Any) -> Outline | None:
    if value is None:
        return Outline(nothing=True)
    if isinstance(value, torch.Tensor):
        return Outline(dtype=value.dtype, device=value.device)
    if isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
        return Outline(item=_inner(value[0]))
    return None


def agreed(a: Outline | None, b: Outline | None) -> Outline | None:
    """What holds for both."""
    if a is None or b is None or a == b:
        return a if a == b else None
    same = a.parts is not None and b.parts is not None and len(a.parts) == len(b.parts)
    return Outline(
        parts=tuple(map(agreed, a.parts or (), b.parts or ())) if same else None,
        item=agreed(a.item, b.item),
        nothing=a.nothing and b.nothing,
        dtype=a.dtype if a.dtype == b.dtype else None,
        device=a.device if a.device == b.device else None,
    )


def of_split(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outline | None:
    """How many parts a splitting function gives, where its arguments alone tell.

    `chunk(n)` may give fewer than n on a short dimension; indexing a missing part raises when it is evaluated.
    """
    parameter = (*args, *kwargs.values())[1] if len(args) + len(kwargs) > 1 else None
    if name == "chunk" and isinstance(parameter, int):
        return of_length(parameter)
    if name in ("split", "split_with_sizes", "tensor_split") and isinstance(parameter, list | tuple):
        return of_length(len(parameter))
    return None
