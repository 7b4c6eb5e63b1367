"""Running jobs: each is a task of the event loop that follows one run of the engine and writes down what it sees.

In a store that is durable, a job that the server's end interrupts stays as it is, and goes on from its last checkpoint
when the next server starts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

from denoised.errors import DenoisedError, QueueFullError, one_line
from denoised.media.save import save
from denoised.outputs import OmniRequestOutput, Preview, Progress, Saved
from denoised.server import kept_asks
from denoised.server.asks import Ask
from denoised.server.jobs import Job, JobStore, changed
from denoised.server.problems import Refusal, of_error
from denoised.server.serving import Run, Serving
from denoised.server.watchers import Watchers
from denoised.server.webhooks import Webhooks


class Jobs:
    """The jobs of a server. A job is removed with all it has: its work, its record and its file."""

    def __init__(self, store: JobStore, webhooks: Webhooks) -> None:
        self.store, self.webhooks, self.watchers = store, webhooks, Watchers()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._doors: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    async def begin(self, job: Job, ask: Ask, serving: Serving) -> Job:
        """Queue a job; it goes on when this returns. The one that is there, if its idempotency key has one.

        Raises:
            InvalidRequestError, QueueFullError, Refusal: it was not queued; there is no such job.
        """
        if job.key is None:
            return await self._begin(job, ask, serving)
        door = self._doors.setdefault((job.tenant, job.key), asyncio.Lock())
        async with door:
            job = replace(job, asked=kept_asks.digest(ask))
            known = self.store.by_key(job.tenant, job.key or "")
            if known is not None and known.asked != job.asked:
                message = "Idempotency-Key: it was used for another request; give each request its own."
                raise Refusal(409, message, param="Idempotency-Key", code="idempotency_key_reused")
            return known or await self._begin(job, ask, serving)

    async def _begin(self, job: Job, ask: Ask, serving: Serving) -> Job:
        if self.store.durable:
            ask = kept_asks.lasting(ask, checkpoint_every=serving.config.job_checkpoint_every)
            job = replace(job, ask=kept_asks.pack(ask))
        await self._start(job, serving.run(ask), is_new=True)
        return job

    async def _start(self, job: Job, run: Run, *, is_new: bool, resumes: bool = False) -> None:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(run)
            await run.accepted()
            if is_new:
                self.store.put(job)
            work = self._follow(job, run, stack.pop_all(), resumes)
        self._spawn(job.id, work)

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks[name] = task
        task.add_done_callback(lambda _: self._tasks.pop(name) if self._tasks.get(name) is task else None)

    async def remove(self, job_id: str) -> None:
        """Stop a job if it runs, and forget it."""
        self.store.remove(job_id)
        task = self._tasks.get(job_id)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
            self.store.remove(job_id)
        self.watchers.ended(job_id)

    async def close(self) -> None:
        """Stop what still runs; its record says so, unless it will go on. Nobody watches any more."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self.watchers.close()
        self.store.close()

    # ---- after a restart

    def go_on(self, serving: Serving) -> None:
        """Queue again what another server left, from its checkpoints, and tell what it did not tell."""
        for job in self.store.unfinished():
            changed(self.store, job.id, status="queued", position=0, eta_seconds=None)
            self._spawn(job.id, self._again(job, serving))
        for job in self.store.untold():
            self._spawn(_told_name(job.id), self._tell(job.id))

    async def _again(self, job: Job, serving: Serving, *, from_start: bool = False) -> None:
        assert job.ask is not None, "durable jobs say what was asked"
        try:
            checkpoint = None if from_start else await asyncio.to_thread(self._checkpoint, job.id)
            await self._admitted(job, kept_asks.unpack(job.ask), serving, checkpoint)
        except (DenoisedError, Refusal) as error:
            self._fail(job.id, of_error(error))
        except Exception as error:
            self._fail(job.id, Refusal(500, one_line(error), code="engine"))

    async def _admitted(self, job: Job, ask: Ask, serving: Serving, checkpoint: Any) -> None:
        while True:
            try:
                run = serving.run(ask, checkpoint)
                await self._start(job, run, is_new=False, resumes=checkpoint is not None)
                return
            except QueueFullError as full:
                await asyncio.sleep(full.retry_after)

    def _checkpoint(self, job_id: str) -> Any:
        """The last one; None if there is none that can be read."""
        from denoised.runtime.checkpoints import Checkpoint

        raw = self.store.checkpoint(job_id)
        try:
            return None if raw is None else Checkpoint.from_bytes(raw)
        except DenoisedError:
            return None

    # ---- while it runs

    async def _follow(self, job: Job, run: Run, stack: AsyncExitStack, resumes: bool) -> None:
        async with stack:
            try:
                async for event in run.events():
                    await self._hear(job, event)
            except (DenoisedError, Refusal) as error:
                if not resumes:
                    self._fail(job.id, of_error(error))
                    return
                self.store.drop_checkpoint(job.id)  # another model, say: it is run from its start
            except asyncio.CancelledError:
                if not self.store.durable:
                    self._fail(job.id, Refusal(503, "the server was shut down before this was done.", code="aborted"))
                raise
            except Exception as error:
                self._fail(job.id, Refusal(500, one_line(error), code="engine"))
                return
            else:
                return
        self._spawn(job.id, self._again(job, run.serving, from_start=True))

    async def _hear(self, job: Job, event: Any) -> None:
        if isinstance(event, Progress):
            changed(self.store, job.id, **_seen(event))
            self.watchers.news(job.id)
        elif isinstance(event, Preview):
            await self.watchers.preview(job.id, event)
        elif isinstance(event, Saved) and self.store.durable:
            await asyncio.to_thread(lambda: self.store.keep_checkpoint(job.id, event.checkpoint.to_bytes()))
        elif isinstance(event, OmniRequestOutput):
            await self._finish(job, event)

    async def _finish(self, job: Job, output: OmniRequestOutput) -> None:
        path = self.store.file(job.id)
        await asyncio.to_thread(save, output, path, fps=job.fps, sample_rate=job.sample_rate)
        known = {"completed_at": int(time.time()), **shape(output, job.fps), **receipt(output)}
        if changed(self.store, job.id, status="completed", eta_seconds=0.0, **known) is None:
            path.unlink(missing_ok=True)
        self._ended(job.id)

    def _fail(self, job_id: str, problem: Refusal) -> None:
        error = {"message": problem.message, "code": problem.code or problem.type}
        changed(self.store, job_id, status="failed", completed_at=int(time.time()), error=error, eta_seconds=None)
        self._ended(job_id)

    # ---- webhooks

    def _ended(self, job_id: str) -> None:
        self.watchers.ended(job_id)
        job = self.store.get(job_id)
        if job is not None and job.webhook is not None:
            self._spawn(_told_name(job_id), self._tell(job_id))

    async def _tell(self, job_id: str) -> None:
        job = self.store.get(job_id)
        if job is not None:
            await self.webhooks.tell(job)
            changed(self.store, job_id, told=True)


def _told_name(job_id: str) -> str:
    return f"{job_id}/webhook"


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
