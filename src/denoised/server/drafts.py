"""Fork and pick: POST /v1/images/drafts runs the first steps of n pictures and puts them aside; those that are chosen
go on from there by POST /v1/images/drafts/{draft_id}/continue. What was computed is not computed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from denoised.outputs import Preview
from denoised.server import drafting, forms, images
from denoised.server.answering import EventStream, event, unless_gone
from denoised.server.asks import Ask, Place
from denoised.server.bodies import MOST_PARTIAL_IMAGES, EditRequest, Format, ImageFields, ImageRequest
from denoised.server.draft_replies import DraftDeleted, DraftList, DraftsReply, shown
from denoised.server.drafting import Begun, Goal
from denoised.server.fields import LONGEST_TIMEOUT, Closed
from denoised.server.kept_drafts import Draft, KeptDrafts
from denoised.server.middleware import tenant_of
from denoised.server.problems import invalid
from denoised.server.replies import ImagesReply
from denoised.server.schema import ERRORS, body
from denoised.server.serving import Run
from denoised.server.uploads import input_images, of_url
from denoised.server.within import place_of, serving_of

router = APIRouter(tags=["images"], responses=ERRORS)
_STREAM: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}
_USUAL_NUMBER = 4
_LARGEST_SEED = 2**63 - 1


class DraftRequest(EditRequest):
    """POST /v1/images/drafts; as JSON, or as a form with the uploads `image` (one or several) and `mask`."""

    n: int | None = Field(None, ge=1, description="drafts, with seeds that count up from seed; default 4")
    draft_steps: int | None = Field(
        None, ge=1, le=1000, description="steps of a draft at most, out of all; default a quarter of them"
    )


class ContinueRequest(Closed):
    """POST /v1/images/drafts/{draft_id}/continue: how the picture is to come. What it is was asked with the draft."""

    output_format: Format | None = Field(None, description="default png")
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp; default 95")
    stream: bool | None = Field(None, description="server-sent events: progress, partial images, the picture")
    partial_images: int | None = Field(
        None, ge=0, le=MOST_PARTIAL_IMAGES, description="previews in a stream; needs stream=true"
    )
    timeout: float | None = Field(None, gt=0, le=LONGEST_TIMEOUT, description="seconds after which it fails with 504")
    priority: int | None = Field(None, ge=-100, le=100, description="the higher goes first")


def drafts_of(request: Request) -> KeptDrafts:
    found: KeptDrafts = request.app.state.drafts
    return found


# ---- making drafts


@router.post(
    "/v1/images/drafts",
    responses={200: {"model": DraftsReply, "content": _STREAM}},
    openapi_extra=body(DraftRequest, uploads=("image", "mask")),
)
async def create(request: Request) -> Response:
    """The first steps of n pictures, kept to go on from. With `stream`, server-sent events `image_draft.progress`,
    `.partial_image` and `.completed`, each with the draft's `index`."""
    asked, files = await forms.read(request, DraftRequest, ("image", "mask"))
    place = place_of(request)
    place.check_kind("image")
    raw = [*files.get("image", ()), *[await of_url(request, url, "url") for url in asked.url or ()]]
    media = await input_images(request, raw, files.get("mask", []), param="image") if files or raw else None
    making = Making(request, place, asked, media)
    if asked.stream:
        return EventStream(making.runs[0], lambda _: making.events(), {"X-Request-Id": making.family})
    return await unless_gone(request, making.reply())


class Making:
    """One request for drafts.

    Raises:
        Refusal: it asks for what cannot be.
    """

    def __init__(self, request: Request, place: Place, asked: DraftRequest, media: dict[str, Any] | None) -> None:
        self._kept, self._place, self._asked = drafts_of(request), place, asked
        self.family = f"draft_{secrets.token_hex(12)}"
        images.check_format(asked, place)
        self._goal = _goal(asked, place)
        self._seeds = _seeds(asked, place)
        self.runs = [serving_of(request).run(self._ask(number, media)) for number in range(len(self._seeds))]
        self._made: list[str] = []

    def _ask(self, number: int, media: dict[str, Any] | None) -> Ask:
        asked = self._asked.model_copy(update={"seed": self._seeds[number]})
        ask = self._place.ask(asked, text=asked.prompt, prefix="draft_", size=asked.size, media=media)
        service = self._goal.service(ask.service)
        return dataclasses.replace(ask, request_id=f"{self.family}-{number}", service=service)

    async def reply(self) -> Response:
        """All drafts, in one piece."""
        made: dict[int, dict[str, Any]] = {}
        async with self.runs[0], contextlib.aclosing(self._drafted()) as drafted:
            async for number, seen in drafted:
                if isinstance(seen, Begun):
                    made[number] = await self._finished(number, seen)
        return JSONResponse({"object": "list", "data": [made[number] for number in sorted(made)]})

    async def events(self) -> AsyncIterator[bytes]:
        """Drafts, and what goes before them, as they come."""
        async with contextlib.aclosing(self._drafted()) as drafted:
            async for number, seen in drafted:
                if isinstance(seen, Begun):
                    yield event("image_draft.completed", {"index": number, **await self._finished(number, seen)})
                elif isinstance(seen, Preview):
                    for picture in await images.pictured(seen.images, self._asked):
                        yield event("image_draft.partial_image", {"index": number, "step": seen.step, **picture})
                else:
                    told = images.progress(seen) | {"draft_step": self._goal.step}
                    yield event("image_draft.progress", {"index": number, **told})

    async def _drafted(self) -> AsyncGenerator[tuple[int, drafting.Told]]:
        """What is told of all drafts; if one fails or the caller hangs up, none is kept."""
        done = False
        try:
            async with contextlib.aclosing(drafting.begin(self.runs)) as told:
                async for number, seen in told:
                    yield number, seen
            done = True
        finally:
            if not done:
                self._kept.drop(self._made)

    async def _finished(self, number: int, begun: Begun) -> dict[str, Any]:
        """Keep a draft, and say what it is."""
        now = self._kept.now()
        draft = Draft(
            id=self.runs[number].ask.request_id,
            family=self.family,
            tenant=self._place.tenant,
            model=self._place.name,
            prompt=self._asked.prompt,
            checkpoint=begun.saved.checkpoint,
            num_bytes=begun.saved.checkpoint.num_bytes,
            seed=self._seeds[number],
            step=begun.saved.step,
            total_steps=begun.total_steps,
            created_at=now,
            expires_at=now + self._kept.seconds,
        )
        self._kept.keep(draft)
        self._made.append(draft.id)
        pictured = await images.pictured(begun.images, self._asked)
        return shown(draft) | {
            "size": pictured[0]["size"],
            "output_format": pictured[0]["output_format"],
            "pictured_step": begun.pictured_step,
            "pictures": [{"b64_json": picture["b64_json"]} for picture in pictured],
        }


def _goal(asked: DraftRequest, place: Place) -> Goal:
    """Where the drafts end; what would not act in them is refused."""
    if asked.partial_images:
        raise invalid(f"partial_images={asked.partial_images}: a draft is a preview itself; leave it out.")
    if (asked.num_outputs_per_prompt or 1) > 1:
        raise invalid(f"num_outputs_per_prompt={asked.num_outputs_per_prompt}: a draft is of one picture; use n.")
    sources = (asked.extra_args or {}, asked.sampling(), place.info.defaults)
    return drafting.goal(asked.draft_steps, drafting.num_steps(*sources))


def _seeds(asked: DraftRequest, place: Place) -> Sequence[int]:
    most = min(place.config.max_n, place.config.max_drafts)
    number = asked.n or min(_USUAL_NUMBER, most)
    if number > most:
        raise invalid(f"n={number}: must be at most {most}; send several requests.")
    seed = asked.sampling().get("seed")
    first = secrets.randbits(31) if seed is None else seed
    return [(first + more) % (_LARGEST_SEED + 1) for more in range(number)]


# ---- what is kept


@router.get("/v1/images/drafts", responses={200: {"model": DraftList}})
async def list_drafts(request: Request) -> Response:
    """The caller's drafts, oldest first, without their pictures."""
    kept = drafts_of(request).all(tenant_of(request.scope))
    return JSONResponse({"object": "list", "data": [shown(draft) for draft in kept]})


@router.delete("/v1/images/drafts/{draft_id}", responses={200: {"model": DraftDeleted}})
async def delete(request: Request, draft_id: str) -> Response:
    """Forget a draft. A picture that goes on from it is not stopped."""
    kept = drafts_of(request)
    kept.drop([kept.get(draft_id, tenant_of(request.scope)).id])
    return JSONResponse({"id": draft_id, "object": "image.draft.deleted", "deleted": True})


# ---- going on


class Continuation(Run):
    """A picture that goes on from a draft, once at a time."""

    def __init__(self, request: Request, ask: Ask, draft: Draft) -> None:
        serving = serving_of(request)
        super().__init__(serving, serving.loaded(), ask, draft.checkpoint)
        self._kept, self._draft = drafts_of(request), draft

    async def __aenter__(self) -> Run:
        self._kept.begin(self._draft.id)
        return await super().__aenter__()

    async def end(self) -> None:
        await super().end()
        self._kept.end(self._draft.id)


@router.post(
    "/v1/images/drafts/{draft_id}/continue",
    responses={200: {"model": ImagesReply, "content": _STREAM}},
    openapi_extra=body(ContinueRequest),
)
async def go_on(request: Request, draft_id: str) -> Response:
    """The picture that a draft began; the receipt's `resumed_from_step` says what was not computed again. Answers as
    /v1/images/generations does. The draft stays, until it is deleted or too old."""
    asked, _ = await forms.read(request, ContinueRequest)
    place = place_of(request)
    draft = drafts_of(request).get(draft_id, place.tenant)
    form: ImageFields = forms.check(ImageRequest, {"prompt": draft.prompt, **asked.model_dump(exclude_none=True)})
    images.check_format(form, place)
    ask = place.ask(form, text=draft.prompt, prefix="img_", num_previews=form.partial_images or 0)
    run = Continuation(request, ask, draft)
    if form.stream:
        headers = {"X-Request-Id": ask.request_id}
        return EventStream(run, lambda run: images.events(run, form, "image_generation"), headers)
    return await unless_gone(request, images.reply(run, form))
