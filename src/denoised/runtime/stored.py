"""Tensors of safetensors files where they lie: mapped, one at a time, and read when somebody looks at them.

Knows the format; nothing of models or ranks.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from denoised.errors import ModelError, one_line
from denoised.runtime.load import read_header

# The format's names of dtypes that torch has.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a tensor is in its file: its bytes are those from `begin` to `end`."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def entries(path: Any) -> dict[str, Entry]:
    """All tensors of a file, read anew if it changed.

    Raises:
        ModelError: it is damaged, or has a dtype that torch does not.
    """
    stat = os.stat(path)
    return _entries(str(path), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _entries(path: str, size: int, changed: int) -> dict[str, Entry]:
    header = read_header(Path(path))
    data = size - max((entry["data_offsets"][1] for entry in header.values()), default=0)
    return {name: _entry(entry, data, f"{path}: {name}") for name, entry in header.items()}


def _entry(entry: dict[str, Any], data: int, name: str) -> Entry:
    """`data`: where in the file the bytes of all tensors begin."""
    if entry["dtype"] not in _DTYPES:
        raise ModelError(f"{name} has dtype {entry['dtype']}, which torch {torch.__version__} does not have.")
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = (data + offset for offset in entry["data_offsets"])
    if end - begin != dtype.itemsize * torch.Size(shape).numel():
        raise ModelError(f"{name} has {end - begin} bytes, which its shape {shape} does not need; download it again.")
    return Entry(dtype=dtype, shape=shape, begin=begin, end=end)


def mapped(path: Any, name: str) -> Tensor:
    """The tensor as it is in the file, without a copy; writing to it leaves the file as it is.

    The pages of this tensor alone are mapped: they are given back when nobody has the tensor any more.

    Raises:
        ModelError: the file can no longer be read.
    """
    try:
        return _mapped(path, entries(path)[name])
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{path} can no longer be read for {name}: {one_line(error)}.") from error


def _mapped(path: Any, entry: Entry) -> Tensor:
    if entry.begin == entry.end:
        return torch.empty(entry.shape, dtype=entry.dtype)
    pages, start = _whole_files.get(str(path)), 0
    if pages is None:
        start = entry.begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        pages = _pages(path, start, entry.end - start)
    count = torch.Size(entry.shape).numel()
    return torch.frombuffer(pages, dtype=entry.dtype, count=count, offset=entry.begin - start).view(entry.shape)


def _pages(path: Any, start: int, length: int) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=start)


_whole_files: dict[str, mmap.mmap] = {}


@contextlib.contextmanager
def whole_files(paths: Iterable[Any]) -> Iterator[None]:
    """Inside, tensors of these files are parts of one mapping of the whole file, which takes less time to read. It is
    given back with the last of them. On all threads."""
    names = {str(path) for path in paths if os.path.isfile(path)}
    _whole_files.update({name: _pages(name, 0, os.path.getsize(name)) for name in names})
    try:
        yield
    finally:
        for name in names:
            _whole_files.pop(name, None)


def announce(path: Any, name: str) -> None:
    """Tell the system that the whole tensor will be read soon: it then reads in large pieces, and ahead."""
    entry = entries(path)[name]
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), entry.begin, entry.end - entry.begin, os.POSIX_FADV_WILLNEED)
