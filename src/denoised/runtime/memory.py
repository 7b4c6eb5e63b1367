"""Facts about the process that go into receipts: peak memory, of all and of each stage, and versions."""

from __future__ import annotations

import contextlib
import functools
import re
import resource
import sys
from importlib import metadata

import torch

_STATUS, _RESET = "/proc/self/status", "/proc/self/clear_refs"
# The high-water mark of the time before it was last set back, in MB.
_before = 0.0


def peak_mb() -> float:
    """Peak memory of this rank in MB: of the device where there is one, else of the process."""
    return max(_before, _mark())


class HighWater:
    """`with HighWater() as high:` then `high.mb` is the most that was in use inside, with all that was there before.

    Where the system's mark cannot be set back (not on Linux), it is the most since the process began.
    """

    mb = 0.0

    def __enter__(self) -> HighWater:
        global _before
        _before = max(_before, _mark())
        if _on_device():
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError), open(_RESET, "w") as file:
                file.write("5")  # the mark becomes what is resident now (man 5 proc)
        return self

    def __exit__(self, *error: object) -> None:
        self.mb = _mark()


def _mark() -> float:
    if _on_device():
        return torch.cuda.max_memory_allocated() / 2**20
    high = in_use("VmHWM")
    if high:
        return high / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def in_use(name: str) -> int:
    """Bytes, by the names of /proc/self/status; 0 where there is no such file."""
    with contextlib.suppress(OSError), open(_STATUS) as file:
        found = re.search(rf"{name}:\s+(\d+) kB", file.read())
        return int(found[1]) * 1024 if found is not None else 0
    return 0


def _on_device() -> bool:
    return torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0


def now_mb() -> float:
    """Memory of this rank now, in MB: allocated on the device where there is one, else of the process."""
    if _on_device():
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
