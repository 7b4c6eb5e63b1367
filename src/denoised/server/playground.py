"""The page at / and what it is told of the model. The page is static files without a build step, holds nothing secret,
and asks nobody but this server.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from denoised.runtime.model_info import COUNT_NAMES, RESERVED, ModelInfo
from denoised.server.bodies import AudioRequest, ImageRequest, VideoRequest
from denoised.server.fields import SAMPLING, RequestFields
from denoised.server.problems import Refusal
from denoised.server.schema import ERRORS
from denoised.server.within import serving_of
from denoised.spec.model_spec import Kind

router = APIRouter(tags=["server"])
FOLDER = Path(__file__).parent / "playground"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; media-src blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@cache
def _files() -> dict[str, tuple[bytes, str]]:
    """The page's files by name, with their digests: these, and no others, whatever a path says."""
    found = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in _TYPES}
    return {name: (raw, f'"{hashlib.sha256(raw).hexdigest()[:16]}"') for name, raw in found.items()}


@router.get("/", include_in_schema=False)
async def page(request: Request) -> Response:
    """The playground."""
    return _file(request, "index.html")


@router.get("/playground/{name}", include_in_schema=False)
async def file(request: Request, name: str) -> Response:
    """What the page is made of."""
    return _file(request, name)


def _file(request: Request, name: str) -> Response:
    if name not in _files():
        raise Refusal(404, f"there is no file {name!r:.80} in the playground.", code="not_found")
    raw, tag = _files()[name]
    headers = {**_HEADERS, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(raw, media_type=_TYPES[Path(name).suffix], headers=headers)


# ---- what the page is told

# A keyword of a pipeline's __call__ that ends so is a tensor, or an object of Python.
_NO_TEXT = (
    "embeds",
    "latents",
    "mask",
    "masks",
    "_ids",
    "kwargs",
    "image",
    "images",
    "video",
    "audio",
    "noise",
    "inputs",
)
_BODIES: dict[Kind, type[RequestFields]] = {"image": ImageRequest, "video": VideoRequest, "audio": AudioRequest}


class Described(BaseModel):
    """The served model for a form: `options` is the JSON Schema of what a request for it may say, by the names of the
    body; what is under `extra_args` there goes into `extra_args`."""

    model: str
    pipeline: str
    kind: Literal["image", "video", "audio"]
    device: str
    takes_image: bool
    needs_image: bool
    takes_mask: bool
    size_multiple: int
    frame_multiple: int
    max_n: int
    max_drafts: int
    draft_minutes: float
    options: dict[str, Any] = Field(description="JSON Schema")


@router.get("/v1/playground", responses={200: {"model": Described}, **ERRORS})
async def describe(request: Request) -> Response:
    """What the page needs to know of the model and of the server's limits."""
    serving = serving_of(request)
    info, config = serving.loaded().info, serving.config
    said = Described(
        model=serving.name,
        pipeline=info.pipeline,
        kind=info.kind,
        device=info.device,
        takes_image="image" in info.parameters,
        needs_image=info.needs_image,
        takes_mask="mask_image" in info.parameters and info.kind == "image",
        size_multiple=info.size_multiple,
        frame_multiple=info.frame_multiple,
        max_n=config.max_n,
        max_drafts=config.max_drafts,
        draft_minutes=config.draft_minutes,
        options=options(info, max_n=config.max_n),
    )
    return JSONResponse(said.model_dump())


def options(info: ModelInfo, *, max_n: int) -> dict[str, Any]:
    """What a request for this model may say, as JSON Schema, with the defaults that are known."""
    whole = _BODIES[info.kind].model_json_schema()["properties"]
    named = {f.name for f in SAMPLING}
    taken = {name: _plain(whole[name]) for name in _names(info) if name in whole}
    if "n" in taken:
        taken["n"]["maximum"] = max_n
    more = sorted(name for name in info.parameters - named if _is_text(name))
    taken["extra_args"] = {"type": "object", "properties": {name: {} for name in more}}
    for name, value in info.defaults.items():
        if name in taken and isinstance(value, int | float | str | bool):
            taken[name]["default"] = value
    return {"type": "object", "properties": taken, "required": [_text_of(info.kind)]}


def _text_of(kind: Kind) -> str:
    return "input" if kind == "audio" else "prompt"


def _names(info: ModelInfo) -> list[str]:
    """Fields of a body that this model takes, in the order of a form."""
    acts = {"seed"} | ({"fps"} if info.kind == "video" else set()) | info.branching_config | info.parameters
    counts = bool(info.parameters & set(COUNT_NAMES))
    own = [_text_of(info.kind), *(["negative_prompt"] if "negative_prompt" in info.parameters else [])]
    own += ["n"] if counts and info.kind == "image" else []
    own += ["audio_length"] if "audio_end_in_s" in info.parameters and info.kind == "audio" else []
    return own + [f.name for f in SAMPLING if f.name in acts and f.name not in ("extra_args", *COUNT_NAMES)]


def _is_text(name: str) -> bool:
    """Whether a keyword of `__call__` can be written into a form, as far as its name tells."""
    known = {"prompt", "negative_prompt", "audio_end_in_s", *COUNT_NAMES, *RESERVED}
    return name not in known and not name.endswith(_NO_TEXT) and not name.startswith("callback")


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """Without the null of fields that may be left out: a form leaves them out."""
    parts = [part for part in schema.get("anyOf", ()) if part.get("type") != "null"]
    rest = {key: value for key, value in schema.items() if key not in ("anyOf", "default", "title")}
    return {**(parts[0] if parts else {}), **rest}
