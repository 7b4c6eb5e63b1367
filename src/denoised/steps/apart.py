"""Results taken apart for a journey between ranks: their tensors, and the structure that puts them together again.

A tree of tensors is its own structure, with numbers in place of the tensors. Any other object (a distribution, a store
of keys and values) is pickled with numbers in their place; the reader is a rank of the same engine, so it can be
trusted.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The structure of a result, and shape and dtype of each tensor."""

    skeleton: Any
    shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    @property
    def num_bytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self.shapes)


@dataclass(frozen=True, kw_only=True)
class _Pickled:
    """A structure that is no tree."""

    data: bytes


def layout(leaves: Sequence[torch.Tensor], skeleton: Any) -> Layout:
    """What the receiver has to know."""
    return Layout(skeleton=skeleton, shapes=tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves))


def flatten(value: Any) -> tuple[list[torch.Tensor], Any]:
    """The tensors in order, and the structure.

    Raises:
        TypeError: it holds what cannot travel: weights, functions.
    """
    leaves: list[torch.Tensor] = []
    try:
        return leaves, _mapped(value, lambda leaf: _number(leaf, leaves))
    except TypeError:
        leaves.clear()
        return leaves, _pickled(value, leaves)


def together(found: Layout, buffer: torch.Tensor, start: int) -> Any:
    """The result, its tensors copied from the bytes of `buffer` from `start` on."""
    leaves = []
    for shape, dtype in found.shapes:
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        # A copy of its own: a view might start at a byte that the dtype is not aligned to.
        leaves.append(buffer[start : start + num_bytes].clone().view(dtype).reshape(shape))
        start += num_bytes
    if isinstance(found.skeleton, _Pickled):
        return _Unpickler(found.skeleton.data, leaves).load()
    return _mapped(found.skeleton, lambda number: None if number is None else leaves[number])


def _number(value: Any, leaves: list[torch.Tensor]) -> int | None:
    if value is None:
        return None
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"a result holds a {type(value).__name__}, which cannot travel between ranks")
    leaves.append(value)
    return len(leaves) - 1


def _mapped(tree: Any, function: Callable[[Any], Any]) -> Any:
    """`function` over the leaves of lists, tuples, dicts and model outputs."""
    if type(tree) in (list, tuple):
        return type(tree)(_mapped(item, function) for item in tree)
    if isinstance(tree, dict):
        items = {key: _mapped(item, function) for key, item in tree.items()}
        return items if type(tree) is dict else type(tree)(**items)
    return function(tree)


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, leaves: list[torch.Tensor]) -> None:
        super().__init__(file)
        self._leaves = leaves

    def persistent_id(self, value: Any) -> int | None:
        if isinstance(value, nn.Module | nn.Parameter):
            raise TypeError(f"it holds a {type(value).__name__}")
        return _number(value, self._leaves) if isinstance(value, torch.Tensor) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, leaves: list[torch.Tensor]) -> None:
        super().__init__(io.BytesIO(data))
        self._leaves = leaves

    def persistent_load(self, number: int) -> torch.Tensor:
        return self._leaves[number]


def _pickled(value: Any, leaves: list[torch.Tensor]) -> _Pickled:
    file = io.BytesIO()
    try:
        _Pickler(file, leaves).dump(value)
    except (pickle.PicklingError, TypeError, AttributeError, RuntimeError) as error:
        raise TypeError(f"a result of type {type(value).__name__} cannot travel between ranks: {error}") from error
    return _Pickled(data=file.getvalue())
