"""Running jobs: each is a task of the event loop that follows one run of the engine and writes down what it sees."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from typing import Any

from denoised.errors import DenoisedError, one_line
from denoised.media.save import save
from denoised.request import OmniRequestOutput, Progress
from denoised.server.jobs import Job, JobStore, changed
from denoised.server.problems import Refusal, of_error
from denoised.server.serving import Run


class Jobs:
    """The jobs of a server. A job is removed with all it has: its work, its record and its file."""

    def __init__(self, store: JobStore) -> None:
        self.store = store
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, job: Job, run: Run, *, fps: float, sample_rate: int | None) -> Job:
        """Queue a job; it goes on when this returns.

        Raises:
            InvalidRequestError, QueueFullError, Refusal: it was not queued; there is no such job.
        """
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(run)
            await run.accepted()
            self.store.put(job)
            work = self._follow(job.id, run, stack.pop_all(), fps, sample_rate)
        task = asyncio.create_task(work, name=job.id)
        self._tasks[job.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(job.id, None))
        return job

    async def remove(self, job_id: str) -> None:
        """Stop a job if it runs, and forget it."""
        self.store.remove(job_id)
        task = self._tasks.get(job_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            self.store.remove(job_id)

    async def close(self) -> None:
        """Stop what still runs; its record says so."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self.store.close()

    async def _follow(self, job_id: str, run: Run, stack: AsyncExitStack, fps: float, sample_rate: int | None) -> None:
        async with stack:
            try:
                async for event in run.events():
                    if isinstance(event, Progress):
                        changed(self.store, job_id, **_seen(event))
                    elif isinstance(event, OmniRequestOutput):
                        await self._finish(job_id, event, fps, sample_rate)
            except (DenoisedError, Refusal) as error:
                self._fail(job_id, of_error(error))
            except asyncio.CancelledError:
                self._fail(job_id, Refusal(503, "the server was shut down before this was done.", code="aborted"))
                raise
            except Exception as error:
                self._fail(job_id, Refusal(500, one_line(error), code="engine"))

    async def _finish(self, job_id: str, output: OmniRequestOutput, fps: float, sample_rate: int | None) -> None:
        path = self.store.file(job_id)
        await asyncio.to_thread(save, output, path, fps=fps, sample_rate=sample_rate)
        known = {"completed_at": int(time.time()), **shape(output, fps), **receipt(output)}
        if changed(self.store, job_id, status="completed", eta_seconds=0.0, **known) is None:
            path.unlink(missing_ok=True)

    def _fail(self, job_id: str, problem: Refusal) -> None:
        error = {"message": problem.message, "code": problem.code or problem.type}
        changed(self.store, job_id, status="failed", completed_at=int(time.time()), error=error, eta_seconds=None)


def _seen(event: Progress) -> dict[str, Any]:
    begun = event.step > 0 or event.position == 0
    return {
        "status": "in_progress" if begun else "queued",
        "step": event.step,
        "total_steps": event.total_steps,
        "position": event.position,
        "eta_seconds": event.eta_seconds,
    }


def shape(output: OmniRequestOutput, fps: float) -> dict[str, str]:
    """Length and size of a video, as OpenAI's objects say them."""
    frames = output.videos[0]
    width, height = frames[0].shape[1::-1] if hasattr(frames[0], "shape") else frames[0].size
    return {"seconds": f"{len(frames) / fps:g}", "size": f"{width}x{height}"}


def receipt(output: OmniRequestOutput) -> dict[str, Any]:
    made = output.receipt
    return {} if made is None else {"receipt": made.as_dict(), "receipt_line": made.line()}
