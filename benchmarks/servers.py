"""Servers in processes of their own, for benchmarks: started, waited for, ended."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator

# As ranks set it for themselves: pages that are mapped anew at each use are slow on some machines. For both sides.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
}


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[str]:
    """`python -m arguments`, a server that prints its address when it is ready; gives the address."""
    environment = {**os.environ, **MALLOC}
    process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        yield _address(process)
    finally:
        process.terminate()
        process.wait(timeout=60)


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(r"http://[\w.:\[\]]+[0-9]", line):
            return found[0]
    raise RuntimeError(f"the server ended with exit code {process.wait()} before it was ready.")
