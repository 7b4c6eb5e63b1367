"""A tensor that is in files, and what becomes of it when it is cut, converted, or computed with.

Knows how to put off what is done to a tensor; nothing of files or modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from denoised.steps import parts
from denoised.steps.tally import count

CACHE_LINE = 64  # bytes
_aten = torch.ops.aten
# What makes a tensor of the elements of others, with no arithmetic: it may be done later, and on the file's dtype.
_MOVES = frozenset(
    {
        *(_aten.detach.default, _aten.alias.default, _aten.clone.default, _aten.cat.default, _aten.stack.default),
        *(_aten.slice.Tensor, _aten.select.int, _aten.split.Tensor, _aten.split_with_sizes.default),
        *(_aten.unbind.int, _aten.view.default, _aten._unsafe_view.default, _aten.t.default),
        *(_aten.transpose.int, _aten.permute.default, _aten.unsqueeze.default, _aten.squeeze.dim),
        *(_aten.expand.default, _aten.zeros_like.default, _aten.lift_fresh.default),
    }
)
# Of these, what leaves all elements where they are.
_SAME = frozenset({_aten.detach.default, _aten.alias.default, _aten.lift_fresh.default, _aten.clone.default})


@dataclass(frozen=True, kw_only=True)
class Whole:
    """Gives a whole tensor of a file as it is there, perhaps its mapped pages. announce: says that it will be read."""

    path: Any
    read: Callable[[], Tensor]
    announce: Callable[[], None]

    def __call__(self) -> Tensor:
        return self.read()


class Unread(Tensor):
    """A tensor whose elements are in files. From the start it says that it is on the device that it will be read to.

    likeness: shape, strides and dtype, on the meta device.
    stored: gives the elements as they are in the files, in the files' dtype; not always in memory of their own.
    dtypes: what they are converted to, one after the other, once they are read.
    reads: False for zeros, which take a shape alone from the files.
    finish: makes what is kept of what was read, such as a quantized tensor of so many `finished_bytes`.
    """

    likeness: Tensor
    stored: Callable[[], Tensor]
    dtypes: tuple[torch.dtype, ...]
    reads: bool
    finish: Callable[[Tensor], Tensor] | None
    finished_bytes: int
    _filled: Tensor | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, likeness: Tensor, device: torch.device, **_: Any) -> Unread:
        empty: Unread = torch.Tensor._make_wrapper_subclass(
            cls, likeness.shape, strides=likeness.stride(), dtype=likeness.dtype, device=device
        )
        return empty

    def __init__(
        self,
        likeness: Tensor,
        device: torch.device,
        *,
        stored: Callable[[], Tensor],
        dtypes: tuple[torch.dtype, ...] = (),
        reads: bool = True,
    ) -> None:
        super().__init__()
        self.likeness, self.stored, self.dtypes, self.reads = likeness, stored, dtypes, reads
        self.finish, self.finished_bytes = None, 0
        self._filled = None

    def finishing(self, finish: Callable[[Tensor], Tensor], num_bytes: int) -> Unread:
        """The same tensor, of which this is made once it is on its device."""
        found = self.alike()
        found.finish, found.finished_bytes = finish, num_bytes
        return found

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Of memory, once it is read."""
        return self.numel() * self.element_size() if self.finish is None else self.finished_bytes

    def read(self) -> Tensor:
        """The elements, for one use or to be kept."""
        found, num_bytes = self.found()
        count("weight_bytes_read", num_bytes)
        return found

    def found(self) -> tuple[Tensor, int]:
        """The elements on their device, and the bytes that are read for them. On any thread."""
        found = self.stored()
        num_bytes = parts.num_bytes(found) * self.reads
        whole = isinstance(self.stored, Whole) and self.likeness.is_contiguous()
        if whole and not self.dtypes and self.device.type == "cpu" and self.finish is None:
            return found, num_bytes
        converted = found
        for dtype in self.dtypes:
            converted = converted.to(dtype)
        if self.finish is not None:
            moved = parts.changed(converted, lambda part: part.to(self.device, non_blocking=True))
            return self.finish(moved), num_bytes
        if converted is not found and converted.stride() == self.stride() and self.device.type == "cpu":
            return converted, num_bytes  # in memory of its own already, from the start of a cache line
        return _copied(converted, self.likeness, self.device), num_bytes

    def alike(self) -> Unread:
        """Another tensor of the same elements."""
        found = Unread(self.likeness, self.device, stored=self.stored, dtypes=self.dtypes, reads=self.reads)
        found.finish, found.finished_bytes = self.finish, self.finished_bytes
        return found

    def host(self) -> Tensor:
        """The elements in the memory of the host, in the dtype that they will have."""
        found = self.stored()
        for dtype in self.dtypes:
            found = found.to(dtype)
        return found

    def announce(self) -> None:
        """They will be read soon."""
        if isinstance(self.stored, Whole):
            self.stored.announce()

    @property
    def is_filled(self) -> bool:
        return self._filled is not None

    def keep(self, value: Tensor) -> Tensor:
        """`value` is what was read, for all who share this tensor."""
        self._filled = nn.Parameter(value, requires_grad=self.requires_grad) if _is_parameter(self) else value
        return self._filled

    def filled(self) -> Tensor:
        """What was read, the same for all who share this tensor."""
        if self._filled is None:
            with torch.no_grad():
                self.keep(self.read())
        assert self._filled is not None
        return self._filled

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Unread({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SAME and not kwargs:
            return args[0].alike()
        if func in _MOVES and not kwargs.keys() & {"dtype", "device", "layout"}:
            tensors = [leaf for leaf in _pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
            own = [leaf for leaf in tensors if isinstance(leaf, Unread)]
            if len(own) == len(tensors) and len({leaf.dtypes for leaf in own}) == 1 and _is_raw(own):
                return _moved(func, own[0], args, kwargs)
        if func is _aten._to_copy.default and "memory_format" not in kwargs and _is_raw([args[0]]):
            return _converted(args[0], **kwargs)
        _check_kept(func, args)
        return func(*_pytree.tree_map_only(Unread, Unread.read, args), **kwargs)


def _is_raw(tensors: list[Unread]) -> bool:
    return all(tensor.finish is None for tensor in tensors)


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter)


def _copied(found: Tensor, likeness: Tensor, device: torch.device) -> Tensor:
    """A copy at `found`'s place within a cache line: CPU kernels round by it, and a pipeline that is loaded plainly
    computes on the mapped files themselves."""
    if device.type != "cpu":
        return torch.empty_like(likeness, device=device).copy_(found, non_blocking=True)
    size = found.element_size()
    room = torch.empty(found.numel() + CACHE_LINE // size, dtype=found.dtype)
    start = (found.data_ptr() - room.data_ptr()) % CACHE_LINE // size
    return room.as_strided(likeness.shape, likeness.stride(), start).copy_(found)


def _moved(func: Any, first: Unread, args: Any, kwargs: dict[str, Any]) -> Any:
    """The tensors that a move gives, or the one tensor, to be moved when they are read."""

    def run(what: Callable[[Unread], Tensor]) -> Any:
        return func(*_pytree.tree_map_only(Unread, what, args), **kwargs)

    def later(likeness: Tensor, index: int | None) -> Unread:
        def stored() -> Tensor:
            found = run(lambda leaf: leaf.stored())
            return found if index is None else found[index]  # type: ignore[no-any-return]

        reads = first.reads and func is not _aten.zeros_like.default
        return Unread(likeness, first.device, stored=stored, dtypes=first.dtypes, reads=reads)

    likenesses = run(lambda leaf: leaf.likeness)
    if isinstance(likenesses, Tensor):
        return later(likenesses, None)
    return [later(likeness, index) for index, likeness in enumerate(likenesses)]


def _converted(
    tensor: Unread, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: Any
) -> Tensor:
    """In another dtype, once it is read. The loaders put all on the CPU first: only its last place counts."""
    likeness = tensor.likeness if dtype is None else tensor.likeness.to(dtype)
    if device is not None and torch.device(device).type == "meta":
        return likeness
    dtypes = tensor.dtypes if dtype is None else (*tensor.dtypes, dtype)
    return Unread(likeness, tensor.device, stored=tensor.stored, dtypes=dtypes, reads=tensor.reads)


def _check_kept(func: Any, args: Any) -> None:
    """Writing into a tensor that is read for one use would write nowhere."""
    for argument, value in zip(func._schema.arguments, args, strict=False):
        written = argument.alias_info is not None and argument.alias_info.is_write
        assert not (written and isinstance(value, Unread)), f"{func} writes to a weight that is not read yet"
