"""What the ranks of an engine hold at most while they make a picture: their own memory, and the weights' files that
they have mapped. Looked at from outside, some times a second, in a process that has run nothing else."""

from __future__ import annotations

import multiprocessing
import os
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Steps, qwen_image, saved
from denoised import DiffusionParallelConfig, Omni, OmniDiffusionSamplingParams

SECONDS_BETWEEN = 0.1
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ *(.*)$")


def most_held(folder: str, degrees: dict[str, Any], params: OmniDiffusionSamplingParams) -> list[float]:
    """MB of each rank at most, over what it holds in such a request for a model with next to no weights."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (folder, degrees, params))


def _measured(folder: str, degrees: dict[str, Any], params: OmniDiffusionSamplingParams) -> list[float]:
    empty = saved(qwen_image(layers=2, heads=2, dtype=torch.bfloat16))
    most = [_most(of, degrees, params) for of in (empty, folder)]
    return [b - a for a, b in zip(*most, strict=True)]


def _most(folder: str, degrees: dict[str, Any], params: OmniDiffusionSamplingParams) -> list[float]:
    parallel = DiffusionParallelConfig(**degrees)
    omni = Omni(folder, parallel_config=parallel, dtype="bfloat16", num_threads=1)
    with omni, _watched(_ranks(omni), folder) as most:
        Steps(omni)(params)
    return most


def _ranks(omni: Omni) -> list[int]:
    """Their processes: one rank is this one."""
    return list(omni._client.rank_pids) or [os.getpid()]


@contextmanager
def _watched(pids: Sequence[int], folder: str) -> Iterator[list[float]]:
    """The most that each process held meanwhile, in MB."""
    most, done = [0.0] * len(pids), threading.Event()

    def watch() -> None:
        while not done.wait(SECONDS_BETWEEN):
            most[:] = [max(a, held(pid, folder)) for a, pid in zip(most, pids, strict=True)]

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def held(pid: int, folder: str) -> float:
    """MB that a process shares with no other, and of files in `folder` whatever is resident."""
    total, counts = 0, ("Private_Clean:", "Private_Dirty:")
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if mapping := _MAPPING.match(line):
            counts = ("Rss:",) if mapping[1].startswith(folder) else ("Private_Clean:", "Private_Dirty:")
        elif line.startswith(counts):
            total += int(line.split()[1])
    return total / 1024
