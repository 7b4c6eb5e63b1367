"""`denoised serve` as a process that benchmarks load, look into and kill."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """What a server's processes hold: threads and open files of the server itself, processes below it, what lies in
    its folder for temporary files."""

    threads: int
    files: int
    processes: int
    temporary: int


class Served:
    """A server that is ready; `arguments` as on the command line. Its temporary files are in a folder of its own.

    key: what /metrics is asked with; errors: a file that gets what the server writes to stderr.
    """

    def __init__(self, *arguments: str, key: str = "none", errors: Path | None = None) -> None:
        self.scratch = Path(tempfile.mkdtemp(prefix="denoised-served-"))
        command = [sys.executable, "-m", "denoised.cli", "serve", *arguments, "--port", "0", "--num-threads", "1"]
        environment = {**os.environ, "TMPDIR": str(self.scratch)}
        # torch's cache of the whole machine, which it would else make an empty folder for.
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "torchinductor"))
        self._errors = (errors or Path(os.devnull)).open("a")
        self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._errors, text=True, env=environment)
        assert self.popen.stdout is not None
        self.line = self.popen.stdout.readline()
        found = re.search(r" at (http://127\.0\.0\.1:\d+), ", self.line)
        if found is None:
            self.kill()
            raise RuntimeError(f"the server did not start: {self.line!r}")
        self.url = found[1]
        self._headers = {"Authorization": f"Bearer {key}"}
        self._process = psutil.Process(self.popen.pid)

    @property
    def ranks(self) -> list[psutil.Process]:
        """Processes of ranks: below the one that forks them, which is below the server."""
        return [rank for host in self._process.children() for rank in _children(host)]

    @property
    def below(self) -> list[psutil.Process]:
        return _children(self._process, recursive=True)

    def megabytes(self) -> tuple[float, list[float]]:
        """Resident memory of the server, and of each process below it that lives."""
        return _resident(self._process), [size for p in self.below if (size := _resident(p))]

    def holdings(self) -> Holdings:
        return Holdings(
            threads=self._process.num_threads(),
            files=self._process.num_fds(),
            processes=len(self.below),
            temporary=sum(len(folders) + len(files) for _, folders, files in os.walk(self.scratch)),
        )

    def is_ready(self) -> bool:
        return httpx2.get(f"{self.url}/health", timeout=30).status_code == 200

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        answer = httpx2.get(f"{self.url}/metrics", timeout=30, headers=self._headers).raise_for_status()
        found = re.findall(rf"^denoised_{name}(?:{{[^}}]*}})? (\S+)$", answer.text, re.MULTILINE)
        return sum(map(float, found))

    def end(self, seconds: float = 60) -> tuple[int, list[str]]:
        """SIGTERM; the exit code, and what it left: processes, temporary files."""
        below = self.below
        self.popen.send_signal(signal.SIGTERM)
        code = self.popen.wait(timeout=seconds)
        _, alive = psutil.wait_procs(below, timeout=10)
        left = [f"process {p.pid}" for p in alive]
        left += [str(path.relative_to(self.scratch)) for path in self.scratch.rglob("*")]
        self.kill()
        return code, left

    def kill(self) -> None:
        """kill -9, whatever it does; and wait until what is below it is gone, too."""
        below = _children(psutil.Process(self.popen.pid), recursive=True) if self.popen.poll() is None else []
        self.popen.kill()
        self.popen.wait()
        assert self.popen.stdout is not None
        self.popen.stdout.close()
        psutil.wait_procs(below, timeout=10)
        self._errors.close()
        shutil.rmtree(self.scratch, ignore_errors=True)


def _children(process: psutil.Process, *, recursive: bool = False) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=recursive))
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Process) -> float:
    try:
        return float(process.memory_info().rss / MIB)
    except psutil.NoSuchProcess:
        return 0.0
