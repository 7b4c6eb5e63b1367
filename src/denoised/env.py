"""What the process needs from its environment: CPU threads, and an allocator that keeps its pages.

glibc maps large blocks anew at each use, and fresh pages are slow on many machines: a VAE decode can cost many times
more than its arithmetic. Ranks on the CPU therefore keep freed memory. DENOISED_KEEP_PAGES=0 switches that off.
"""

from __future__ import annotations

import ctypes
import os
import sys

# glibc's mallopt parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_LARGEST = 2**31 - 1


def keep_pages() -> bool:
    """Tell glibc to keep freed memory in this process; False where that is not possible or not wanted."""
    if os.environ.get("DENOISED_KEEP_PAGES", "1") == "0" or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # One arena: blocks of other arenas are limited to 64 MB and would be mapped anew all the same.
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, _LARGEST), (_M_TOP_PAD, 2**28))
    return all(mallopt(name, value) == 1 for name, value in settings)


def default_threads(local_ranks: int) -> int:
    """CPU threads of each rank: the cores this process may use, shared by the ranks of this node."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // local_ranks)


def num_accelerators() -> int | None:
    """CUDA devices that this process may use, or None where there is none; asks the driver, without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return None
    if visible is None:
        return count.value
    return len([name for name in visible.split(",") if name.strip()]) or None
