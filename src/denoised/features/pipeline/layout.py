"""What can be known of a forward before it runs: its signature, the shapes of its blocks' outputs, who needs them.

Only data; the same on all ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

# What Python compares by value, and what decides the course of a forward. Not floats: scales and times, which differ
# from step to step.
_DECISIVE = (bool, int, str, bytes, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Stands for a tensor in a tree."""

    size: tuple[int, ...]
    dtype: torch.dtype

    def blank(self, device: torch.device) -> Tensor:
        """A tensor of this shape in which every element is one that no result may depend on."""
        number = self.dtype.is_floating_point or self.dtype.is_complex
        value = float("nan") if number else True if self.dtype == torch.bool else torch.iinfo(self.dtype).max
        return torch.full(self.size, value, dtype=self.dtype, device=device)

    def outline(self, device: torch.device) -> Tensor:
        """Shape, dtype and device alone: a view of one element."""
        return torch.empty(1, dtype=self.dtype, device=device).expand(self.size)


@dataclass(frozen=True, kw_only=True)
class Event:
    """One call of a block: its output with a `Shape` for each tensor, and the stages that need each of these.

    runs: it is computed; else something stood in for it that costs nothing.
    """

    block: int
    output: Any
    stages: tuple[frozenset[int], ...]
    runs: bool = True

    def is_for(self, stage: int) -> bool:
        return any(stage in needed for needed in self.stages)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A forward: its calls of blocks. home: the stage that has its output, which is that of the last of them."""

    events: tuple[Event, ...]
    home: int


def tensors(tree: Any) -> list[Tensor]:
    """The tensors of a tree in order."""
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def shapes(tree: Any) -> Any:
    """The tree with shapes for tensors."""
    return _pytree.tree_map_only(Tensor, lambda x: Shape(size=tuple(x.shape), dtype=x.dtype), tree)


def outlines(tree: Any) -> list[Shape]:
    """The shapes in an outline, in order."""
    return [leaf for leaf in _pytree.tree_leaves(tree) if isinstance(leaf, Shape)]


def fill(outline: Any, make: Callable[[int, Shape], Tensor]) -> Any:
    """The tree with tensors for shapes; `make` gets the number of each."""
    count = itertools.count()
    return _pytree.tree_map_only(Shape, lambda shape: make(next(count), shape), outline)


def replace(tree: Any, leaves: list[Tensor]) -> Any:
    """The tree with other tensors, in order."""
    rest = iter(leaves)
    return _pytree.tree_map_only(Tensor, lambda _: next(rest), tree)


def signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Calls of equal signature take the same way through the model."""
    leaves, structure = _pytree.tree_flatten((args, kwargs))
    return str(structure), tuple(_leaf(leaf) for leaf in leaves)


def _leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return (tuple(leaf.shape), leaf.dtype)
    return leaf if isinstance(leaf, _DECISIVE) else type(leaf).__name__
