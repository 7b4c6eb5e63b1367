"""A weight in blocks of a GGUF file: few bits a value in memory, and its values whenever somebody computes with it.

Knows what may be done to blocks as they are (rows are taken, columns by whole blocks, rows put together); the
arithmetic of each kind of block is diffusers' own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from denoised.errors import InvalidConfigError
from denoised.features.quantize.blocks import block, unpack

_aten = torch.ops.aten


class Packed(Tensor):
    """blocks: uint8 (..., bytes of a row). kind: the number of the block's kind in the format. dtype: of its values.

    Whatever it meets that blocks cannot do, it meets as its values: the product of a layer, too.
    """

    blocks: Tensor
    kind: int

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, blocks: Tensor, kind: int, dtype: torch.dtype) -> Packed:
        values, num_bytes = block(kind)
        shape = (*blocks.shape[:-1], blocks.shape[-1] // num_bytes * values)
        found: Packed = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=blocks.device)
        return found

    def __init__(self, blocks: Tensor, kind: int, dtype: torch.dtype) -> None:
        super().__init__()
        assert blocks.dtype == torch.uint8, "bytes"
        self.blocks, self.kind = blocks, kind

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["blocks"], (self.kind, self.dtype)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: Any, size: Any, stride: Any) -> Packed:
        return Packed(inner["blocks"], *context)

    def _stable_hash_for_caching(self) -> str:
        """What of it a compiled graph depends on."""
        return repr(self)

    @property
    def columns(self) -> int:
        """In pieces of so many columns it can be cut."""
        return block(self.kind)[0]

    def like(self, blocks: Tensor) -> Packed:
        return Packed(blocks, self.kind, self.dtype)

    def values(self) -> Tensor:
        """A plain tensor; computed anew by every call."""
        per_block, num_bytes = block(self.kind)
        blocks = self.blocks.reshape(-1, num_bytes)
        exact = torch.float32 if self.dtype == torch.float32 else torch.float16  # as scales are in the file
        found: Tensor = unpack(self.kind)(blocks, per_block, num_bytes, exact)
        return found.reshape(self.shape).to(self.dtype)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Packed({tuple(self.shape)}, kind={self.kind}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        moved = _MOVES[func](*args, **(kwargs or {})) if func in _MOVES else None
        if moved is not None:
            return moved
        return func(*_values_in(args), **_values_in(kwargs or {}))


def _values_in(tree: Any) -> Any:
    return _pytree.tree_map_only(Packed, Packed.values, tree)


# What blocks can do as they are. None: not in this case.


def _same(packed: Packed, **options: Any) -> Packed | None:
    return None if options else packed.like(packed.blocks)


def _clone(packed: Packed, **_: Any) -> Packed:
    return packed.like(packed.blocks.clone())


def _to(packed: Packed, **options: Any) -> Packed:
    device = options.get("device") or packed.device
    blocks = packed.blocks.to(device, non_blocking=options.get("non_blocking", False))
    return Packed(blocks, packed.kind, options.get("dtype") or packed.dtype)


def _slice(packed: Packed, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    dim, size = dim % packed.ndim, packed.shape[dim]
    begin, stop, _ = slice(start, end).indices(size)
    if dim < packed.ndim - 1:
        return packed.like(_aten.slice.Tensor(packed.blocks, dim, begin, stop, step))
    values, num_bytes = block(packed.kind)
    if step != 1:
        return None
    if begin % values or stop % values:
        raise InvalidConfigError(
            f"a weight of the GGUF file is in blocks of {values} values, and would be cut inside of one (columns "
            f"{begin} to {stop} of {size}); use a smaller tensor_parallel_size, or a file of smaller blocks, as Q8_0."
        )
    return packed.like(packed.blocks[..., begin // values * num_bytes : stop // values * num_bytes])


def _split(packed: Packed, size: Any, dim: int = 0) -> Any:
    sizes = [size] * -(-packed.shape[dim] // size) if isinstance(size, int) else size
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    return [_slice(packed, dim, end - length, end) for end, length in zip(ends, sizes, strict=True)]


def _cat(tensors: list[Any], dim: int = 0) -> Packed | None:
    """Rows of one kind; columns as well, for they are whole blocks."""
    if not all(isinstance(tensor, Packed) for tensor in tensors) or len({tensor.kind for tensor in tensors}) != 1:
        return None
    blocks = [tensor.blocks for tensor in tensors]
    return tensors[0].like(blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim))  # type: ignore[no-any-return]


_MOVES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default), _same),
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to,
    _aten.slice.Tensor: _slice,
    _aten.split.Tensor: _split,
    _aten.split_with_sizes.default: _split,
    _aten.cat.default: _cat,
}
