"""POST /v1/videos and what becomes of the job; POST /v1/videos/sync, which answers with the file."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field
from starlette.responses import FileResponse, JSONResponse, Response

from denoised.media.save import save
from denoised.outputs import OmniRequestOutput
from denoised.server import forms
from denoised.server.answering import unless_gone
from denoised.server.asks import Ask, Place
from denoised.server.bodies import VideoRequest
from denoised.server.fields import Closed
from denoised.server.jobs import Job
from denoised.server.middleware import tenant_of
from denoised.server.problems import Refusal, invalid
from denoised.server.replies import RECEIPT_HEADER, VideoDeleted, VideoList, VideoReply, header_line, headers_of
from denoised.server.schema import ERRORS, body
from denoised.server.serving import Run
from denoised.server.uploads import input_images, of_url
from denoised.server.within import jobs_of, place_of, serving_of

router = APIRouter(tags=["videos"], responses=ERRORS)
_BODY = body(VideoRequest, uploads=("input_reference",))
_FILE: dict[int | str, dict[str, Any]] = {200: {"content": {"video/mp4": {"schema": {"type": "string"}}}}}
# How long a client should wait before it asks again, where it asks us.
MAX_KEY = 255  # characters of an idempotency key
_POLL_HEADERS = {"openai-poll-after-ms": "500"}


class ListQuery(Closed):
    """Strict fields would refuse the text that queries are made of."""

    model_config = {"strict": False}
    after: str | None = Field(None, description="the last id of the page before")
    limit: int = Field(20, ge=1, le=100)
    order: Literal["asc", "desc"] = "desc"


@router.post("/v1/videos", responses={200: {"model": VideoReply}}, openapi_extra=_BODY)
async def create(request: Request) -> Response:
    """Start a job."""
    asked, ask = await _asked(request)
    if asked.webhook is not None:
        await asyncio.to_thread(jobs_of(request).webhooks.check, asked.webhook)
    place, jobs = place_of(request), jobs_of(request)
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= MAX_KEY:
        raise invalid(f"Idempotency-Key: must have 1 to {MAX_KEY} characters.", param="Idempotency-Key")
    job = Job(
        id=ask.request_id,
        tenant=place.tenant,
        created_at=int(time.time()),
        model=place.name,
        prompt=asked.prompt,
        body=asked.model_dump(exclude_none=True),
        size=asked.size if asked.size != "auto" else None,
        fps=place.fps(asked),
        sample_rate=place.info.sample_rate,
        key=key,
        webhook=asked.webhook,
    )
    job = await unless_gone(request, jobs.begin(job, ask, serving_of(request)))
    return JSONResponse(shown(job), headers=_POLL_HEADERS)


@router.post("/v1/videos/sync", response_class=FileResponse, responses=_FILE, openapi_extra=_BODY)
async def sync(request: Request) -> Response:
    """Make a video and answer with it, as MP4; the receipt is in a header."""
    asked, ask = await _asked(request)
    if asked.webhook is not None:
        raise invalid("webhook: this route answers with the video; use /v1/videos.", param="webhook")
    if asked.partial_images:
        raise invalid("partial_images: this route answers with the video; use /v1/videos.", param="partial_images")
    place = place_of(request)
    reply = _file(serving_of(request).run(ask), place.fps(asked), place.info.sample_rate)
    return await unless_gone(request, reply)


async def _asked(request: Request) -> tuple[VideoRequest, Ask]:
    asked, files = await forms.read(request, VideoRequest, ("input_reference",))
    place = place_of(request)
    place.check_kind("video")
    place.one_output(asked)
    raw = files.get("input_reference", [])
    if asked.input_reference is not None:
        raw = [*raw, await of_url(request, asked.input_reference.image_url, "input_reference")]
    if len(raw) > 1:
        raise invalid("input_reference is given twice; give it once.")
    media = await input_images(request, raw, [], param="input_reference") if raw else None
    return asked, _ask(place, asked, media)


def _ask(place: Place, asked: VideoRequest, media: dict[str, Any] | None) -> Ask:
    frames, previews = place.num_frames(asked), asked.partial_images or 0
    more: dict[str, Any] = {"num_frames": frames, "num_previews": previews}
    return place.ask(asked, text=asked.prompt, prefix="video_", size=asked.size, media=media, **more)


async def _file(run: Run, fps: float, sample_rate: int | None) -> Response:
    async with run:
        output = await run.output()
        raw = await asyncio.to_thread(mp4, output, fps, sample_rate)
    return Response(raw, media_type="video/mp4", headers=headers_of(output))


def mp4(output: OmniRequestOutput, fps: float, sample_rate: int | None) -> bytes:
    """The video as a file's bytes."""
    with tempfile.TemporaryDirectory(prefix="denoised-video-") as folder:
        [path] = save(output, Path(folder) / "video.mp4", fps=fps, sample_rate=sample_rate)
        return path.read_bytes()


# ---- jobs


@router.get("/v1/videos", responses={200: {"model": VideoList}})
async def list_videos(request: Request, query: Annotated[ListQuery, Query()]) -> Response:
    """The caller's jobs, a page of them."""
    jobs = jobs_of(request).store.all(tenant_of(request.scope))
    jobs = jobs[::-1] if query.order == "desc" else jobs
    ids = [job.id for job in jobs]
    if query.after is not None and query.after not in ids:
        raise invalid(f"after={query.after!r:.80}: there is no such video; give an id of the page before.")
    rest = jobs[ids.index(query.after) + 1 :] if query.after is not None else jobs
    page = [shown(job) for job in rest[: query.limit]]
    first, last = (page[0]["id"], page[-1]["id"]) if page else (None, None)
    more = len(rest) > len(page)
    return JSONResponse({"object": "list", "data": page, "first_id": first, "last_id": last, "has_more": more})


@router.get("/v1/videos/{video_id}", responses={200: {"model": VideoReply}})
async def retrieve(request: Request, video_id: str) -> Response:
    """How far a job is."""
    return JSONResponse(shown(job_of(request, video_id)), headers=_POLL_HEADERS)


@router.get("/v1/videos/{video_id}/content", response_class=FileResponse, responses=_FILE)
async def content(
    request: Request, video_id: str, variant: Annotated[Literal["video"], Query()] = "video"
) -> Response:
    """The file of a job that is completed."""
    job = job_of(request, video_id)
    if job.status != "completed":
        message = f"video_id={job.id}: it is {job.status.replace('_', ' ')}; ask again when it is completed."
        raise Refusal(409, message, param="video_id", code="not_completed")
    path = jobs_of(request).store.file(job.id)
    headers = {RECEIPT_HEADER: header_line(job.receipt_line)}
    return FileResponse(path, media_type="video/mp4", filename=f"{job.id}.mp4", headers=headers)


@router.delete("/v1/videos/{video_id}", responses={200: {"model": VideoDeleted}})
async def delete(request: Request, video_id: str) -> Response:
    """Forget a job and its file; if it runs, stop it."""
    job = job_of(request, video_id)
    await jobs_of(request).remove(job.id)
    return JSONResponse({"id": job.id, "object": "video.deleted", "deleted": True})


def job_of(request: Request, video_id: str) -> Job:
    """The caller's job; those of others are not there.

    Raises:
        Refusal: 404.
    """
    job = jobs_of(request).store.get(video_id)
    if job is None or job.tenant != tenant_of(request.scope):
        raise Refusal(404, f"video_id={video_id!r:.80}: there is no such video.", param="video_id", code="not_found")
    return job


def shown(job: Job) -> dict[str, Any]:
    """OpenAI's fields, then our own."""
    own = ("step", "total_steps", "position", "eta_seconds", "receipt")
    same = ("id", "created_at", "completed_at", "model", "prompt", "status", "progress", "seconds", "size", "error")
    shown = {name: getattr(job, name) for name in (*same, *own)}
    return {"object": "video", "expires_at": None, **shown}
