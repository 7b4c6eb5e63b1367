"""Tensors in what a block is given and gives: found by path, and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from denoised.steps.trees import rebuild

Path = tuple[str | int, ...]
Leaves = dict[Path, Tensor]


@dataclass(frozen=True)
class Place:
    """Where a tensor was."""

    path: Path


def leaves(tree: Any) -> Leaves:
    """The tensors of tuples, lists and dicts, by path."""
    return dict(_leaves(tree, ()))


def _leaves(tree: Any, path: Path) -> Iterator[tuple[Path, Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
    for name, part in _parts(tree):
        yield from _leaves(part, (*path, name))


def _parts(tree: Any) -> Iterator[tuple[str | int, Any]]:
    if isinstance(tree, dict):
        yield from tree.items()
    elif isinstance(tree, list | tuple):
        yield from enumerate(tree)


def at(tree: Any, path: Path) -> Any:
    """What is there."""
    for name in path:
        tree = tree[name]
    return tree


def skeleton(tree: Any, path: Path = ()) -> Any:
    """The same with a `Place` for each tensor."""
    if isinstance(tree, Tensor):
        return Place(path)
    parts = {name: skeleton(part, (*path, name)) for name, part in _parts(tree)}
    if isinstance(tree, dict):
        return rebuild(tree, {str(name): part for name, part in parts.items()})
    return type(tree)(parts.values()) if type(tree) in (list, tuple) else tree


def filled(bare: Any, tensors: Mapping[Path, Tensor]) -> Any:
    """The inverse of `skeleton`."""
    if isinstance(bare, Place):
        return tensors[bare.path]
    if isinstance(bare, dict):
        return rebuild(bare, {name: filled(part, tensors) for name, part in bare.items()})
    return type(bare)(filled(part, tensors) for part in bare) if type(bare) in (list, tuple) else bare


def places(bare: Any) -> list[Path]:
    """Where a skeleton's tensors are."""
    if isinstance(bare, Place):
        return [bare.path]
    return [path for _, part in _parts(bare) for path in places(part)]
