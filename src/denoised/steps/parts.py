"""Tensors that are made of others, as quantized ones are of codes and scales. Knows how to take them apart and nothing
of what they are for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that it is made of: itself, if it is plain."""
    names = _names(tensor)
    return [tensor] if names is None else [found for name in names for found in parts(getattr(tensor, name))]


def is_made(tensor: Tensor) -> bool:
    """Whether it is made of others."""
    return _names(tensor) is not None


def changed(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The same of changed parts: on another device, in other memory."""
    if not is_made(tensor):
        return change(tensor)
    made: Any = tensor.data if isinstance(tensor, nn.Parameter) else tensor
    names, context = made.__tensor_flatten__()
    inner = {name: changed(getattr(made, name), change) for name in names}
    found: Tensor = type(made).__tensor_unflatten__(inner, context, made.shape, made.stride())
    return found


def joined(tensors: list[Tensor]) -> Tensor:
    """One below the other. Each part of them has something for each row."""
    if len(tensors) == 1:
        return tensors[0]
    first: Any = tensors[0]
    names, context = first.__tensor_flatten__()
    inner = {name: torch.cat([getattr(tensor, name) for tensor in tensors]) for name in names}
    shape = torch.Size((sum(tensor.shape[0] for tensor in tensors), *first.shape[1:]))
    found: Tensor = type(first).__tensor_unflatten__(inner, context, shape, first.stride())
    return found


def num_bytes(tensor: Tensor) -> int:
    """Of memory, where `nbytes` says what it would be unquantized."""
    return sum(part.numel() * part.element_size() for part in parts(tensor))


def _names(tensor: Any) -> list[str] | None:
    if isinstance(tensor, DTensor):  # a shard of a plain tensor; its other part is no tensor but a mesh
        return None
    flatten = getattr(tensor, "__tensor_flatten__", None)
    return None if flatten is None else flatten()[0]
