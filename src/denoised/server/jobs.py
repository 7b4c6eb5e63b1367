"""Jobs: work that outlives the HTTP request which asked for it. Here is what a job is, and a store in memory.

A store that survives a restart has the same four methods and a folder.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

JobStatus = Literal["queued", "in_progress", "completed", "failed"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One video that was asked for. Times are Unix seconds; `seconds`, `size`: of the video, None until known.

    `body` is what was asked, as plain data. `error` is {message, code}; `receipt` as in `Receipt.as_dict`.
    `ask` is what the engine was asked, as `kept_asks.pack` gives it, and None where nobody will ask again; `fps` and
    `sample_rate` are of the file. `key` is the idempotency key that it was asked for under, `asked` the digest of what
    was asked under it. `webhook` is a URL that is told when the job is done; `told`: it has heard, or never will.
    """

    id: str
    tenant: str
    created_at: int
    model: str
    prompt: str
    body: dict[str, Any]
    status: JobStatus = "queued"
    step: int = 0
    total_steps: int = 0
    position: int = 0
    eta_seconds: float | None = None
    seconds: str | None = None
    size: str | None = None
    completed_at: int | None = None
    error: dict[str, str] | None = None
    receipt: dict[str, Any] | None = None
    receipt_line: str = ""
    ask: dict[str, Any] | None = None
    fps: float = 24.0
    sample_rate: int | None = None
    key: str | None = None
    asked: str = ""
    webhook: str | None = None
    told: bool = False

    @property
    def done(self) -> bool:
        return self.status in ("completed", "failed")

    @property
    def progress(self) -> int:
        """Per cent of the denoising steps; 100 says that the file is there."""
        if self.status == "completed":
            return 100
        return min(99, 100 * self.step // self.total_steps) if self.total_steps else 0


class JobStore(Protocol):
    """Jobs by id, and files by job. Every change is final when the method returns.

    `durable`: jobs go on when another server opens the store.
    """

    durable: bool

    def put(self, job: Job) -> None:
        """Add a job, or replace what is known of it."""

    def get(self, job_id: str) -> Job | None: ...

    def remove(self, job_id: str) -> None:
        """Forget a job and its file."""

    def all(self, tenant: str) -> list[Job]:
        """A tenant's jobs, oldest first."""

    def file(self, job_id: str) -> Path:
        """Where a job's video is, or will be."""

    def by_key(self, tenant: str, key: str) -> Job | None:
        """The job that a tenant asked for under an idempotency key."""

    def unfinished(self) -> list[Job]:
        """Jobs that another server left, oldest first."""

    def untold(self) -> list[Job]:
        """Jobs that are done, and whose webhook has not been heard."""

    def keep_checkpoint(self, job_id: str, raw: bytes) -> None:
        """In place of the job's one before it."""

    def checkpoint(self, job_id: str) -> bytes | None:
        """The last that was kept."""

    def drop_checkpoint(self, job_id: str) -> None: ...

    def close(self) -> None: ...


class MemoryStore:
    """Jobs of this process. At most `limit`: the oldest that are done make room."""

    durable = False

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._jobs: dict[str, Job] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # made when there is something to put there

    def put(self, job: Job) -> None:
        self._jobs[job.id] = job
        done = [other.id for other in self._jobs.values() if other.done]
        for job_id in done[: max(0, len(self._jobs) - self._limit)]:
            self.remove(job_id)

    def get(self, job_id: str) -> Job | None:
        return self._jobs.get(job_id)

    def remove(self, job_id: str) -> None:
        self._jobs.pop(job_id, None)
        self.file(job_id).unlink(missing_ok=True)

    def all(self, tenant: str) -> list[Job]:
        return [job for job in self._jobs.values() if job.tenant == tenant]

    def by_key(self, tenant: str, key: str) -> Job | None:
        return next((job for job in self.all(tenant) if job.key == key), None)

    def unfinished(self) -> list[Job]:
        return []

    def untold(self) -> list[Job]:
        return []

    def keep_checkpoint(self, job_id: str, raw: bytes) -> None:
        """Nobody would ask for it."""

    def checkpoint(self, job_id: str) -> bytes | None:
        return None

    def drop_checkpoint(self, job_id: str) -> None:
        """There is none."""

    def file(self, job_id: str) -> Path:
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="denoised-jobs-")
        return Path(self._folder.name) / f"{job_id}.mp4"

    def close(self) -> None:
        if self._folder is not None:
            self._folder.cleanup()


def changed(store: JobStore, job_id: str, **values: Any) -> Job | None:
    """Change what is known of a job; None if it was removed meanwhile, and stays so."""
    job = store.get(job_id)
    if job is not None:
        job = dataclasses.replace(job, **values)
        store.put(job)
    return job
