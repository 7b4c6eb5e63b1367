"""Trees of arguments and outputs: tensors and lists that carry rows, in tuples, dicts and model outputs.

Which parts carry rows is read off their shapes: dim 0, or the length of a list, is the number of rows.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

Tree = Any

_BY_VALUE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, enum.Enum)


def carries_rows(value: Tree, batch: int, *, as_list: bool) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dim() > 0 and value.shape[0] == batch
    if not isinstance(value, list) or len(value) != batch:
        return False
    return as_list or not all(isinstance(x, torch.Tensor) and x.dim() and x.shape[0] == batch for x in value)


def _pick(value: Tree, rows: tuple[int, ...]) -> Tree:
    if isinstance(value, list):
        return [value[i] for i in rows]
    first, last = rows[0], rows[-1]
    is_range = rows == tuple(range(first, last + 1))
    return value[first : last + 1] if is_range else value[list(rows)]


def take(value: Tree, rows: tuple[int, ...], batch: int, *, as_list: bool = False) -> Tree:
    """The given rows of a tree of tensors and lists; what carries no rows is returned as it is."""
    if carries_rows(value, batch, as_list=as_list):
        return _pick(value, rows)
    if type(value) in (list, tuple):
        return type(value)(take(x, rows, batch, as_list=_inner(value, as_list)) for x in value)
    if isinstance(value, dict):
        return rebuild(value, {k: take(x, rows, batch, as_list=as_list) for k, x in value.items()})
    return value


def _inner(value: Tree, as_list: bool) -> bool:
    """A list with one entry a row may stand inside a tuple or a model output, never inside another list."""
    return as_list and isinstance(value, tuple)


def rebuild(original: dict[str, Any], items: dict[str, Any]) -> Any:
    """A mapping of the same class: model outputs are ordered dicts with fields."""
    return items if type(original) is dict else type(original)(**items)


def concatenate(values: Sequence[Tree], batches: Sequence[int], *, as_list: bool = False) -> Tree:
    """The inverse of `take` over several trees of one structure."""
    first = values[0]
    if carries_rows(first, batches[0], as_list=as_list):
        return [x for v in values for x in v] if isinstance(first, list) else torch.cat(list(values))
    if type(first) in (list, tuple):
        inner = _inner(first, as_list)
        return type(first)(concatenate([v[i] for v in values], batches, as_list=inner) for i in range(len(first)))
    if isinstance(first, dict):
        return rebuild(first, {k: concatenate([v[k] for v in values], batches, as_list=as_list) for k in first})
    return first


def shape_signature(value: Tree, batch: int, *, as_list: bool = False) -> Any:
    """What must agree for rows to be joined, as far as shapes tell."""
    if isinstance(value, torch.Tensor):
        shape = tuple(value.shape)
        return (shape[1:] if carries_rows(value, batch, as_list=as_list) else ("shared", *shape), value.dtype)
    if carries_rows(value, batch, as_list=as_list):
        return ("rows", *sorted({repr(shape_signature(x, -1)) for x in value}))
    if type(value) in (list, tuple):
        return tuple(shape_signature(x, batch) for x in value)
    if isinstance(value, dict):
        return tuple((k, shape_signature(x, batch)) for k, x in value.items())
    # Only what Python compares by value may be equal and yet another object: a repr can hide a difference.
    return (type(value).__name__, repr(value)) if isinstance(value, _BY_VALUE) else (type(value).__name__, id(value))


def objects(value: Tree) -> Iterator[Any]:
    """The leaves of a tree that are objects with attributes: neither tensors nor plain values."""
    if isinstance(value, list | tuple):
        for x in value:
            yield from objects(x)
    elif isinstance(value, dict):
        yield from objects(list(value.values()))
    elif hasattr(value, "__dict__") and not isinstance(value, (torch.Tensor, *_BY_VALUE)) and not callable(value):
        yield value


def is_idle(value: Any) -> bool:
    """Whether an object holds nothing but numbers: no tensor, no name of a mode."""
    if isinstance(value, list | tuple):
        return all(map(is_idle, value))
    if isinstance(value, dict):
        return all(map(is_idle, value.values()))
    if value is None or isinstance(value, bool | int | float):
        return True
    return any(True for _ in objects(value)) and is_idle(vars(value))


def shared_leaves(value: Tree, batch: int, *, as_list: bool = False) -> Iterable[torch.Tensor]:
    if carries_rows(value, batch, as_list=as_list):
        return
    if isinstance(value, torch.Tensor):
        yield value
    elif type(value) in (list, tuple):
        for x in value:
            yield from shared_leaves(x, batch)
    elif isinstance(value, dict):
        yield from shared_leaves(list(value.values()), batch)
