"""Sleeping until a word of shared memory changes: the kernel's futex, which Python has no name for.

Words are 32 bits, in memory that processes share. x86-64 Linux.
"""

from __future__ import annotations

import ctypes
from typing import Any

_SYS_FUTEX, _WAIT, _WAKE, _ALL = 202, 0, 1, 2**31 - 1
_libc = ctypes.CDLL(None, use_errno=True)


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def wait(words: Any, place: int, seen: int, *, seconds: float) -> None:
    """Sleep while word `place` of an array is `seen`, at most so long; it may end for no reason."""
    time = _Time(int(seconds), int(seconds % 1 * 1e9))
    _libc.syscall(_SYS_FUTEX, _address(words, place), _WAIT, ctypes.c_uint32(seen), ctypes.byref(time), None, 0)


def wake(words: Any, place: int) -> None:
    """Everybody who sleeps on that word."""
    _libc.syscall(_SYS_FUTEX, _address(words, place), _WAKE, _ALL, None, None, 0)


def _address(words: Any, place: int) -> ctypes.c_void_p:
    return ctypes.c_void_p(words.ctypes.data + place * words.strides[0])
