"""Weights that stay in their files until a rank knows which part of them it keeps.

A pipeline of several ranks is loaded with `unread()`: the libraries' own loaders run, but what they get for a tensor
is an `Unread`, with shape and dtype and no memory. Whatever cuts it (slices, copies of slices, zeros in its likeness)
is noted down and not done; what drops it costs nothing. `fill()` then reads what is left, tensor by tensor, so that
the most a rank ever holds is what it keeps and one tensor. Whoever computes with an `Unread` before gets it read,
for that one use.

Knows safetensors files and tensors; nothing of models, ranks, or of how features cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils import _pytree

from denoised import hf
from denoised.errors import ModelError, one_line
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


def unread(device: str) -> AbstractContextManager[None]:
    """Inside, the libraries load models whose weights from safetensors files are `Unread`, and go to this device."""
    opened = functools.partial(_File, device=torch.device(device))
    return hf.opening_weights(load_file=functools.partial(_load_file, opened), safe_open=opened)


def fill(module: nn.Module) -> None:
    """Read everything of a module that is still unread, into memory of its own; tied tensors stay one.

    Counts `weight_bytes_read`, in the files' dtypes.

    Raises:
        ModelError: a file cannot be read any more.
    """
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if isinstance(parameter, Unread):
                part._parameters[name] = parameter.filled(parameter=True)
        for name, buffer in part._buffers.items():
            if isinstance(buffer, Unread):
                part._buffers[name] = buffer.filled(parameter=False)


class Unread(Tensor):
    """A tensor whose elements are in files. From the start it says that it is on the device that it will be read to.

    likeness: shape, strides and dtype, on the meta device.
    stored: gives the elements as they are in the files, in the files' dtype.
    dtypes: what they are converted to, one after the other, once they are read.
    reads: False for zeros, which take a shape alone from the files.
    """

    likeness: Tensor
    stored: Callable[[], Tensor]
    dtypes: tuple[torch.dtype, ...]
    reads: bool
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
        self._filled = None

    def read(self) -> Tensor:
        """The elements, in memory that is all this tensor's own."""
        found = self.stored()
        count("weight_bytes_read", found.nbytes * self.reads)
        for dtype in self.dtypes:
            found = found.to(dtype)
        return _copied(found, self.likeness, self.device)

    def filled(self, *, parameter: bool) -> Tensor:
        """What was read, the same for all who share this tensor."""
        if self._filled is None:
            with torch.no_grad():
                value = self.read()
            self._filled = nn.Parameter(value, requires_grad=self.requires_grad) if parameter else value
        return self._filled

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Unread({tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _MOVES and not kwargs.keys() & {"dtype", "device", "layout"}:
            tensors = [leaf for leaf in _pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
            own = [leaf for leaf in tensors if isinstance(leaf, Unread)]
            if len(own) == len(tensors) and len({leaf.dtypes for leaf in own}) == 1:
                return _moved(func, own[0], args, kwargs)
        if func is _aten._to_copy.default and "memory_format" not in kwargs:
            return _converted(args[0], **kwargs)
        _check_kept(func, args)
        return func(*_pytree.tree_map_only(Unread, Unread.read, args), **kwargs)


def _copied(found: Tensor, likeness: Tensor, device: torch.device) -> Tensor:
    """A copy at `found`'s place within a cache line: CPU kernels round by it, and a pipeline that is loaded plainly
    computes on the mapped files themselves."""
    if device.type != "cpu":
        return torch.empty_like(likeness, device=device).copy_(found)
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


class _File:
    """One file, as safetensors' own `safe_open` gives it, except that tensors and slices are unread."""

    def __init__(self, path: Any, *_: Any, device: torch.device, **__: Any) -> None:
        self._path, self._device = path, device
        self._file: Any = safe_open(path, framework="pt")

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_tensor(self, name: str) -> Unread:
        likeness = self._file.get_tensor(name).to("meta")  # a view of the mapped file: nothing is read
        return Unread(likeness, self._device, stored=lambda: _stored(self._path, name))

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self, name, self._file.get_slice(name))


class _Slice:
    """One tensor of a file, not asked for yet."""

    def __init__(self, file: _File, name: str, slice_: Any) -> None:
        self._file, self._name, self._slice = file, name, slice_

    def __getitem__(self, index: Any) -> Any:
        return self._file.get_tensor(self._name)[index]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._slice, name)


def _load_file(opened: Callable[[Any], _File], path: Any, *_: Any, **__: Any) -> dict[str, Tensor]:
    """What safetensors' function of this name gives, unread. The device is ours, whatever is asked for."""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in list(file.keys())}  # noqa: SIM118


def _stored(path: Any, name: str) -> Tensor:
    """A view of the mapped file, opened for this tensor alone: pages that were looked at are given back with it."""
    try:
        with safe_open(path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor
    except Exception as error:
        raise ModelError(f"{path} can no longer be read for {name}: {one_line(error)}.") from error
