"""GET /v1/videos/{video_id}/events: what becomes of a job, as server-sent events, from where it stands to its end."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from denoised.server.answering import Watched, event
from denoised.server.jobs import Job
from denoised.server.schema import ERRORS
from denoised.server.videos import job_of, shown
from denoised.server.watchers import Shown
from denoised.server.within import jobs_of
from denoised.server.working import Jobs

router = APIRouter(tags=["videos"], responses=ERRORS)
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
_PROGRESS = ("id", "status", "progress", "step", "total_steps", "position", "eta_seconds")


@router.get("/v1/videos/{video_id}/events", response_class=Response, responses=_STREAM)
async def events(request: Request, video_id: str) -> Response:
    """Server-sent events of a job: `video.progress`, at once and whenever something changes; `video.partial_image`,
    if `partial_images` was asked for; last, `video.completed` or `video.failed` with the job, or `video.deleted`.
    Hanging up ends the stream, not the job."""
    job = job_of(request, video_id)
    return Watched(_events(jobs_of(request), job.id))


async def _events(jobs: Jobs, job_id: str) -> AsyncIterator[bytes]:
    """A slow reader misses steps, never the end."""
    told: dict[str, Any] | None = None
    num_shown = 0
    with jobs.watchers.watch(job_id) as bell:
        while not jobs.watchers.closed:
            bell.clear()
            job = jobs.store.get(job_id)
            if job is None:
                yield event("video.deleted", {"id": job_id})
                return
            if job.done:
                yield event(f"video.{job.status}", shown(job))
                return
            for preview in jobs.watchers.previews(job_id)[num_shown:]:
                num_shown += 1
                yield event("video.partial_image", _of_preview(job_id, preview))
            now = _progress(job)
            if now != told:
                told = now
                yield event("video.progress", now)
            await bell.wait()


def _progress(job: Job) -> dict[str, Any]:
    return {name: getattr(job, name) for name in _PROGRESS}


def _of_preview(job_id: str, preview: Shown) -> dict[str, Any]:
    return {
        "id": job_id,
        "partial_image_index": preview.index,
        "step": preview.step,
        "size": preview.size,
        "output_format": "png",
        "b64_json": preview.b64_json,
    }
