"""Weights that stay in their files until a rank knows which part of them it keeps.

A pipeline of several ranks is loaded with `unread()`: the libraries' own loaders run, but what they get for a tensor
is an `Unread`, with shape and dtype and no memory. Whatever cuts it (slices, copies of slices, zeros in its likeness)
is noted down and not done; what drops it costs nothing. `fill()` then reads what is left, tensor by tensor, so that
the most a rank ever holds is what it keeps and one tensor for each thread that reads. Whoever computes with an
`Unread` before gets it read, for that one use. On the CPU a whole tensor in the dtype of its file is not even copied:
it is the mapped file, whose pages all ranks of a machine share.

`away` and `fetch` are the same for weights that come and go later (features/offload).

Knows tensors, and what stands for them; nothing of models, ranks, or of how features cut.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from denoised import hf
from denoised.runtime import stored
from denoised.runtime.unread import Unread, Whole
from denoised.steps import parts
from denoised.steps.tally import count

__all__ = ["Unread", "away", "fetch", "fill", "fill_all", "later", "unread"]

PAGE = 4096  # bytes
BATCH = 2**24  # bytes


def unread(device: str) -> AbstractContextManager[None]:
    """Inside, the libraries load models whose weights from safetensors files are `Unread`, and go to this device."""
    opened = functools.partial(_File, device=torch.device(device))
    return hf.opening_weights(load_file=functools.partial(_load_file, opened), safe_open=opened)


def fill(module: nn.Module) -> None:
    """Read everything of a module that is still unread; tied tensors stay one.

    Counts `weight_bytes_read`, in the files' dtypes.

    Raises:
        ModelError: a file cannot be read any more.
    """
    for names, name, tensor in _unread_in([module]):
        names[name] = tensor.filled()


def fill_all(modules: Iterable[nn.Module], *, threads: int, progress: bool = False) -> None:
    """The same for all of a pipeline side by side, on so many threads. What is mapped is read too, if there are any.

    Args:
        threads: 0: only this one, and what is mapped is read when it is used.
        progress: show a bar of bytes, on a terminal.

    Raises:
        ModelError: a file cannot be read any more.
    """
    places = list(_unread_in(modules))
    if threads:
        _read_side_by_side({id(tensor): tensor for _, _, tensor in places}.values(), threads, progress)
    for names, name, tensor in places:
        names[name] = tensor.filled()


def _read_side_by_side(tensors: Iterable[Unread], threads: int, progress: bool) -> None:
    waiting = [tensor for tensor in tensors if not tensor.is_filled]
    total = sum(tensor.likeness.nbytes for tensor in waiting)
    with (
        stored.whole_files({tensor.stored.path for tensor in waiting if isinstance(tensor.stored, Whole)}),
        ThreadPoolExecutor(threads, thread_name_prefix="weights") as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=None if progress else True) as bar,
    ):
        batches = list(_batches(waiting))
        for batch, values in zip(batches, pool.map(_fully_read, batches), strict=True):
            for tensor, (value, num_bytes) in zip(batch, values, strict=True):
                count("weight_bytes_read", num_bytes)
                tensor.keep(value)
            bar.update(sum(value.nbytes for value, _ in values))


def _batches(tensors: list[Unread]) -> Iterator[list[Unread]]:
    """Neighbours, a batch as large as is worth handing from thread to thread."""
    batch: list[Unread] = []
    for tensor in tensors:
        batch.append(tensor)
        if sum(t.likeness.nbytes for t in batch) >= BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _fully_read(batch: list[Unread]) -> list[tuple[Tensor, int]]:
    for tensor in batch:
        tensor.announce()
    with torch.no_grad():
        found = [tensor.found() for tensor in batch]
    for value, _ in found:
        touch(value)
    return found


def touch(tensor: Tensor) -> None:
    """Have all pages of a mapped file read, by looking at one byte of each."""
    for part in parts.parts(tensor):
        if part.device.type == "cpu" and part.is_contiguous() and part.numel():
            part.detach().view(-1).view(torch.uint8)[::PAGE].max()


def _unread_in(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, Unread]]:
    for part in (part for module in modules for part in module.modules()):
        for names in (part._parameters, part._buffers):
            for name, tensor in list(names.items()):
                if isinstance(tensor, Unread):
                    yield names, name, tensor


def away(tensor: Tensor) -> Unread | None:
    """What stands for a tensor while it is not on its device: on the CPU what is in a file, on an accelerator a copy
    in pinned memory. None: it is on the CPU, and in no file."""
    if tensor.device.type == "cpu":
        return tensor if isinstance(tensor, Unread) and not tensor.is_filled else None
    likeness = tensor.likeness if isinstance(tensor, Unread) else _likeness(tensor)
    if (isinstance(tensor, Unread) and tensor.finish is not None) or parts.is_made(tensor):
        return _away_made(tensor, likeness)
    pinned = torch.empty_like(likeness, device="cpu", pin_memory=True)
    with torch.no_grad():
        pinned.copy_(tensor.host() if isinstance(tensor, Unread) else tensor)
    return Unread(likeness, tensor.device, stored=lambda: pinned)


def _likeness(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _away_made(tensor: Tensor, likeness: Tensor) -> Unread:
    """Quantized once, on the device; what waits in pinned memory are codes and scales."""
    with torch.no_grad():
        made = tensor.found()[0] if isinstance(tensor, Unread) else tensor
        pinned = parts.changed(made, _pinned)
    found = Unread(likeness, tensor.device, stored=lambda: pinned)
    return found.finishing(lambda moved: moved, parts.num_bytes(pinned))


def _pinned(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True).copy_(tensor)


def later(tensor: Tensor, make: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, int] | None:
    """What stands for `make(tensor)`, and its bytes; an unread tensor is not read for that, and is made when it is.

    make: None: keep what its file has, if that is made of parts. Gives None where nothing is made of it.
    """
    if not isinstance(tensor, Unread):
        found = tensor.detach() if make is None else make(tensor.detach())
        return (found, parts.num_bytes(found)) if parts.is_made(found) else None
    sample = tensor.stored() if make is None else make(tensor.likeness)
    if not parts.is_made(sample):
        return None
    size = parts.num_bytes(sample)
    return tensor.finishing(make or (lambda found: found), size), size


def fetch(tensor: Tensor) -> Tensor:
    """What `away` stood for, on its device. A copy from pinned memory may still be on its way, on this stream."""
    assert isinstance(tensor, Unread)
    return tensor.found()[0]


class _File:
    """One file, as safetensors' own `safe_open` gives it, except that tensors and slices are unread."""

    def __init__(self, path: Any, *_: Any, device: torch.device, **__: Any) -> None:
        self._path, self._device = path, device
        self._file: Any = safe_open(path, framework="np")  # for what is said about tensors; they are mapped by us
        self._in_parts = hf.holds_parts(self._file.metadata())  # type: ignore[no-untyped-call]

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_tensor(self, name: str) -> Tensor:
        if self._in_parts:  # which the loaders put together at once
            return _stored(self._path, name).to(self._device)
        entry = stored.entries(self._path)[name]
        likeness = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        return Unread(likeness, self._device, stored=_whole(self._path, name))

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


def _whole(path: Any, name: str) -> Whole:
    announce = functools.partial(stored.announce, path, name)
    return Whole(path=path, read=functools.partial(_stored, path, name), announce=announce)


def _stored(path: Any, name: str) -> Tensor:
    """A view of the mapped file. All reading of weights comes through here."""
    return stored.mapped(path, name)
