"""Memory that the processes of a group on one machine share, words in it to wait for, and who is still there.

Only on Linux on x86, where stores are seen in the order in which they were made. Knows nothing of what is exchanged.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import platform
import secrets
import select
import sys
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from denoised.steps import futex

# A word that is about to change is waited for awake, if every rank has a core of its own; asleep otherwise.
_SPINS = 1500
_NAP = 0.1
_LINE = 64  # bytes; each word has a line of the cache to itself
_TOKEN = 8


class RankGoneError(RuntimeError):
    """A rank that another waits for has ended, or has left the group."""


class SharedMemory:
    """One rank's end of `num_words` words, all 0 at first, and of `num_bytes` bytes.

    Pages that nobody touches take no memory. pids: of the ranks, in order.
    """

    def __init__(self, memory: mmap.mmap, num_words: int, pids: Sequence[int], rank: int, *, spins: int = 0) -> None:
        self.rank, self.size, self._spins = rank, len(pids), spins
        lines = np.frombuffer(memory, dtype=np.uint32, count=(num_words + self.size) * _LINE // 4)
        words = lines.reshape(-1, _LINE // 4)[:, 0]
        self.words, self._gone = words[:num_words], words[num_words:]
        self.bytes: Tensor = torch.frombuffer(memory, dtype=torch.uint8)[(num_words + self.size) * _LINE :]
        self._processes = {r: os.pidfd_open(pid) for r, pid in enumerate(pids) if r != rank}
        weakref.finalize(self, _close, list(self._processes.values()))

    def put(self, word: int, value: int) -> None:
        """Everything written before is seen by whoever sees this value."""
        self.words[word] = value
        futex.wake(self.words, word)

    def wait(self, word: int, least: int, rank: int, patience: float | None = None) -> None:
        """Until `word`, which is that rank's to change, is `least` or more.

        Raises:
            TimeoutError: after `patience` seconds.
            RankGoneError: it will never be.
        """
        words = self.words
        for _ in range(self._spins):
            if words[word] >= least:
                return
        until = None if patience is None else time.monotonic() + patience
        while (seen := int(words[word])) < least:
            if self._gone[rank] or _has_ended(self._processes[rank]):
                raise RankGoneError(f"rank {rank} of this group has ended.")
            if until is not None and time.monotonic() > until:
                raise TimeoutError(f"rank {rank} of this group did not come in time.")
            futex.wait(words, word, seen, seconds=_NAP)

    def leave(self) -> None:
        """Nothing more comes from here: who waits for it is told, within a nap."""
        self._gone[self.rank] = 1


def num_bytes(num_words: int, num_ranks: int, data: int) -> int:
    """Of the whole; the last few tell one from another."""
    return (num_words + num_ranks) * _LINE + data + _TOKEN


def shared_by(group: dist.ProcessGroup, num_words: int, data: int) -> SharedMemory | None:
    """The group's, made by its first rank. All ranks ask; None for all where one of them cannot have it."""
    if not is_possible():
        return None
    rank, total = group.rank(), num_bytes(num_words, group.size(), data)
    token, file = secrets.token_bytes(_TOKEN), _file(total) if rank == 0 else None
    machines, pids, files, tokens = zip(*_gathered((_machine(), os.getpid(), file, token), group), strict=True)
    memory = _mapped(pids[0], files[0], total) if len(set(machines)) == 1 else None
    if memory is not None and rank == 0:
        memory[-_TOKEN:] = tokens[0]
    _gathered(None, group)  # it is written, and whoever can has it open
    if file is not None:
        os.close(file)
    sees = memory is not None and memory[-_TOKEN:] == tokens[0]
    if not all(_gathered(sees, group)) or memory is None:
        return None
    spins = _SPINS if dist.get_world_size() <= len(os.sched_getaffinity(0)) else 0
    return SharedMemory(memory, num_words, pids, rank, spins=spins)


def is_possible() -> bool:
    """On this machine."""
    return sys.platform == "linux" and platform.machine() in ("x86_64", "AMD64")


def _gathered(value: Any, group: dist.ProcessGroup) -> list[Any]:
    table: list[Any] = [None] * group.size()
    dist.all_gather_object(table, value, group=group)
    return table


def _machine() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")


def _file(num_bytes: int) -> int | None:
    """A file that is nowhere, so that nothing is left of it however its processes end."""
    try:
        file = os.memfd_create("denoised-ranks")
        os.ftruncate(file, num_bytes)
    except OSError:
        return None
    return file


def _mapped(pid: int, file: int | None, num_bytes: int) -> mmap.mmap | None:
    if file is None:
        return None
    with contextlib.suppress(OSError):
        descriptor = os.open(f"/proc/{pid}/fd/{file}", os.O_RDWR)
        try:
            return mmap.mmap(descriptor, num_bytes)
        finally:
            os.close(descriptor)
    return None


def _has_ended(pidfd: int) -> bool:
    """Also if nobody has asked for its exit code yet."""
    return bool(select.select([pidfd], [], [], 0)[0])


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
