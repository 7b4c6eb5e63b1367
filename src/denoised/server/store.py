"""Jobs that survive a restart: records in SQLite, files and checkpoints in folders beside it.

Whatever a method did is on disk when it returns, for a process that is killed; files appear whole or not at all. One
server has a folder at a time. Times are Unix seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from denoised.errors import InvalidConfigError
from denoised.server.jobs import Job

_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT UNIQUE NOT NULL, tenant TEXT NOT NULL, key TEXT, done INTEGER NOT NULL, ended INTEGER,
    record TEXT NOT NULL, ask TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS by_key ON jobs (tenant, key) WHERE key IS NOT NULL;
CREATE INDEX IF NOT EXISTS by_end ON jobs (done, ended);
"""
_PUT = """
INSERT INTO jobs (id, tenant, key, done, ended, record, ask) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET done = excluded.done, ended = excluded.ended, record = excluded.record
"""
_FIELDS = frozenset(f.name for f in dataclasses.fields(Job)) - {"ask"}


class SqliteStore:
    """A folder of jobs.

    Args:
        folder: made if it is not there.
        limit: jobs that are kept; the oldest that are done make room.
        max_age: seconds that a job is kept once it is done.
        clock: gives the time.

    Raises:
        InvalidConfigError: another server has the folder, or it cannot be written.
    """

    durable = True

    def __init__(
        self, folder: str | Path, *, limit: int, max_age: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._folder, self._limit, self._max_age, self._clock = Path(folder).expanduser(), limit, max_age, clock
        try:
            for part in ("files", "checkpoints"):
                (self._folder / part).mkdir(parents=True, exist_ok=True)
            self._lock = (self._folder / "lock").open("w")
        except OSError as error:
            raise InvalidConfigError(f"jobs_folder={str(folder)!r}: cannot be written ({error.strerror}).") from error
        self._take(folder)
        self._db = sqlite3.connect(self._folder / "jobs.sqlite3", isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(_TABLE)
        self._sweep()

    def _take(self, folder: str | Path) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise InvalidConfigError(
                f"jobs_folder={str(folder)!r}: another server has it; give each server its own."
            ) from error

    # ---- jobs

    def put(self, job: Job) -> None:
        """Add a job, or replace what is known of it; what was asked is written once."""
        record = {name: getattr(job, name) for name in _FIELDS}
        ask = None if job.ask is None else json.dumps(job.ask)
        row = (job.id, job.tenant, job.key, job.done, job.completed_at, json.dumps(record), ask)
        self._db.execute(_PUT, row)
        if job.done:
            self.drop_checkpoint(job.id)
            self._make_room()

    def get(self, job_id: str) -> Job | None:
        return next(self._jobs("WHERE id = ?", job_id), None)

    def remove(self, job_id: str) -> None:
        """Forget a job and its files."""
        self._db.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
        self.file(job_id).unlink(missing_ok=True)
        self.drop_checkpoint(job_id)

    def all(self, tenant: str) -> list[Job]:
        """A tenant's jobs, oldest first."""
        return list(self._jobs("WHERE tenant = ? ORDER BY number", tenant))

    def by_key(self, tenant: str, key: str) -> Job | None:
        """The job that a tenant asked for under this idempotency key."""
        return next(self._jobs("WHERE tenant = ? AND key = ?", tenant, key), None)

    def unfinished(self) -> list[Job]:
        """Jobs that were queued or running when the server ended, oldest first, with what was asked."""
        return list(self._jobs("WHERE NOT done ORDER BY number"))

    def untold(self) -> list[Job]:
        """Jobs that are done, and whose webhook has not been heard."""
        return [job for job in self._jobs("WHERE done ORDER BY number") if job.webhook is not None and not job.told]

    def _jobs(self, where: str, *values: Any) -> Iterator[Job]:
        for record, ask in self._db.execute(f"SELECT record, ask FROM jobs {where}", values).fetchall():
            known = {name: value for name, value in json.loads(record).items() if name in _FIELDS}
            yield Job(**known, ask=None if ask is None else json.loads(ask))

    def _make_room(self) -> None:
        oldest = self._clock() - self._max_age
        stale = self._db.execute("SELECT id FROM jobs WHERE done AND ended < ?", (oldest,)).fetchall()
        surplus = self._db.execute(
            "SELECT id FROM jobs WHERE done ORDER BY number LIMIT max(0, (SELECT count(*) FROM jobs) - ?)",
            (self._limit,),
        ).fetchall()
        for (job_id,) in {*stale, *surplus}:
            self.remove(job_id)

    def _sweep(self) -> None:
        """What a process that was killed left half done."""
        self._make_room()
        known = {job_id for (job_id,) in self._db.execute("SELECT id FROM jobs")}
        for part in ("files", "checkpoints"):
            for path in (self._folder / part).iterdir():
                if path.suffix == ".part" or path.name.partition(".")[0] not in known:
                    path.unlink(missing_ok=True)

    # ---- files

    def file(self, job_id: str) -> Path:
        """Where a job's video is, or will be."""
        return self._folder / "files" / f"{job_id}.mp4"

    def keep_checkpoint(self, job_id: str, raw: bytes) -> None:
        """In place of the job's one before it. May be called on any thread."""
        path = self._checkpoint(job_id)
        with path.with_suffix(".part").open("wb") as file:
            file.write(raw)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".part"), path)

    def checkpoint(self, job_id: str) -> bytes | None:
        """The last that was kept."""
        with contextlib.suppress(FileNotFoundError):
            return self._checkpoint(job_id).read_bytes()
        return None

    def drop_checkpoint(self, job_id: str) -> None:
        self._checkpoint(job_id).unlink(missing_ok=True)

    def _checkpoint(self, job_id: str) -> Path:
        return self._folder / "checkpoints" / f"{job_id}.safetensors"

    def close(self) -> None:
        """Give the folder back; all that is in it stays."""
        self._db.close()
        self._lock.close()
