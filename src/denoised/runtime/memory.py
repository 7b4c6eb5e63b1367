"""Facts about the process that go into receipts: peak memory and versions."""

from __future__ import annotations

import functools
import resource
import sys
from importlib import metadata

import torch


def peak_mb() -> float:
    """Peak memory of this rank in MB: of the device where there is one, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def now_mb() -> float:
    """Memory of this rank now, in MB: allocated on the device where there is one, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.memory_allocated() / 2**20
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20
    except OSError:  # no such file on this system
        return peak_mb()


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what decides the bytes of a result."""
    return {name: _version(name) for name in ("denoised", "torch", "diffusers", "transformers")}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
