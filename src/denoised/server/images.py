"""POST /v1/images/generations and /v1/images/edits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from denoised.outputs import OmniRequestOutput, Preview, Progress
from denoised.server import forms, pictures
from denoised.server.answering import EventStream, event, unless_gone
from denoised.server.asks import Ask, Place
from denoised.server.bodies import EditRequest, ImageFields, ImageRequest
from denoised.server.problems import invalid
from denoised.server.replies import ImagesReply, headers_of, receipt_of
from denoised.server.schema import ERRORS, body
from denoised.server.serving import Run
from denoised.server.uploads import input_images, of_url
from denoised.server.within import place_of, serving_of

router = APIRouter(tags=["images"], responses=ERRORS)
_EDIT = body(EditRequest, uploads=("image", "mask"), json=False)
_STREAM: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}
_REPLY: dict[int | str, dict[str, Any]] = {200: {"model": ImagesReply, "content": _STREAM}}


@router.post("/v1/images/generations", responses=_REPLY, openapi_extra=body(ImageRequest))
async def generations(request: Request) -> Response:
    """Images from a prompt. With `stream`, server-sent events `image_generation.progress`, `.partial_image` and
    `.completed`."""
    asked, _ = await forms.read(request, ImageRequest)
    place = place_of(request)
    return await _answer(request, asked, _ask(place, asked, None), "image_generation")


@router.post("/v1/images/edits", responses=_REPLY, openapi_extra=_EDIT)
async def edits(request: Request) -> Response:
    """Images from a prompt and pictures. A mask says where to paint: transparent (or white) there. With `stream`,
    server-sent events `image_edit.progress`, `.partial_image` and `.completed`."""
    asked, files = await forms.read(request, EditRequest, ("image", "mask"))
    place = place_of(request)
    place.check_kind("image")
    raw = [*files.get("image", ()), *[await of_url(request, url, "url") for url in asked.url or ()]]
    media = await input_images(request, raw, files.get("mask", []), param="image")
    return await _answer(request, asked, _ask(place, asked, media), "image_edit")


def _ask(place: Place, asked: ImageFields, media: dict[str, Any] | None) -> Ask:
    place.check_kind("image")
    check_format(asked, place)
    previews = asked.partial_images or 0
    return place.ask(
        asked, text=asked.prompt, prefix="img_", n=asked.n, size=asked.size, media=media, num_previews=previews
    )


def check_format(asked: ImageFields, place: Place) -> None:
    """Refuse a form of file that the pictures cannot have."""
    format = _format(asked)
    if asked.output_compression is not None and format == "png":
        given = asked.output_compression
        raise invalid(f"output_compression={given}: png loses nothing; use output_format jpeg or webp.")
    if asked.background == "transparent" and format == "jpeg":
        raise invalid("background=transparent: jpeg has no alpha channel; use output_format png or webp.")
    if asked.background == "transparent" and place.info.image_mode != "RGBA":
        raise invalid(f"background=transparent: {place.name} makes opaque images; leave it out.")


def _format(asked: ImageFields) -> str:
    return asked.output_format or "png"


async def _answer(request: Request, asked: ImageFields, ask: Ask, name: str) -> Response:
    serving = serving_of(request)
    run = serving.run(ask)
    if asked.stream:
        return EventStream(run, lambda run: events(run, asked, name), {"X-Request-Id": ask.request_id})
    return await unless_gone(request, reply(run, asked))


async def reply(run: Run, asked: ImageFields) -> Response:
    """The pictures of a run, in one piece."""
    async with run:
        output = await run.output()
        images = await _encoded(output.images, asked)
    made = {"created": int(time.time()), "data": [{"b64_json": image} for image in images]}
    made |= {**_look(output.images, asked), "receipt": receipt_of(output)}
    return JSONResponse(made, headers=headers_of(output))


async def _encoded(images: list[Any], asked: ImageFields) -> list[str]:
    return await asyncio.to_thread(
        pictures.encode_all,
        pictures.flat(images),
        _format(asked),
        asked.output_compression,
        opaque=asked.background == "opaque",
    )


def _look(images: list[Any], asked: ImageFields) -> dict[str, str]:
    """What OpenAI's answers say of pictures."""
    first = pictures.flat(images)[0]
    clear = first.mode == "RGBA" and asked.background != "opaque" and _format(asked) != "jpeg"
    background = "transparent" if clear else "opaque"
    return {"size": f"{first.width}x{first.height}", "output_format": _format(asked), "background": background}


async def events(run: Run, asked: ImageFields, name: str) -> AsyncIterator[bytes]:
    """The pictures of a run and what goes before them, as server-sent events."""
    async for seen in run.events():
        if isinstance(seen, Progress):
            yield event(f"{name}.progress", progress(seen))
        elif isinstance(seen, Preview):
            for image in await pictured(seen.images, asked):
                yield event(f"{name}.partial_image", {"partial_image_index": seen.index, "step": seen.step, **image})
        elif isinstance(seen, OmniRequestOutput):
            for image in await pictured(seen.images, asked):
                yield event(f"{name}.completed", {**image, "receipt": receipt_of(seen)})


def progress(seen: Progress) -> dict[str, Any]:
    """Of an event `.progress`: steps done and to do, requests before it, seconds until its end, where known."""
    return {
        "step": seen.step,
        "total_steps": seen.total_steps,
        "position": seen.position,
        "eta_seconds": seen.eta_seconds,
    }


async def pictured(images: list[Any], asked: ImageFields) -> list[dict[str, Any]]:
    """An event's data for each picture; `image_index` says which of n it is."""
    common = {"created_at": int(time.time()), "quality": "auto", **_look(images, asked)}
    encoded = await _encoded(images, asked)
    return [{"b64_json": image, "image_index": index, **common} for index, image in enumerate(encoded)]
