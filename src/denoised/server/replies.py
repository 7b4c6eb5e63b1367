"""What answers look like, for the schema at /openapi.json. Routes write them as plain data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from denoised.outputs import OmniRequestOutput

RECEIPT_HEADER = "X-Denoised-Receipt"
_RECEIPT = "what really ran: model, steps, forwards of each rank, rows joined, seconds of each stage, seed"


class Problem(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(BaseModel):
    error: Problem


class ImageData(BaseModel):
    b64_json: str


class ImagesReply(BaseModel):
    created: int
    data: list[ImageData]
    output_format: Literal["png", "jpeg", "webp"]
    size: str
    background: Literal["transparent", "opaque"]
    receipt: dict[str, Any] = Field(description=_RECEIPT)


class VideoReply(BaseModel):
    """A video job: OpenAI's fields, and from `step` on our own. `eta_seconds`: until its end, where known."""

    id: str
    object: Literal["video"]
    created_at: int
    completed_at: int | None
    expires_at: int | None
    model: str
    prompt: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int = Field(ge=0, le=100)
    seconds: str | None
    size: str | None
    error: dict[str, str] | None
    step: int
    total_steps: int
    position: int = Field(description="requests before it")
    eta_seconds: float | None
    receipt: dict[str, Any] | None = Field(description=_RECEIPT)


class VideoList(BaseModel):
    object: Literal["list"]
    data: list[VideoReply]
    first_id: str | None
    last_id: str | None
    has_more: bool


class VideoDeleted(BaseModel):
    id: str
    object: Literal["video.deleted"]
    deleted: Literal[True]


class ChatReply(BaseModel):
    """`message.content` is a list of {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    receipt: dict[str, Any] = Field(description=_RECEIPT)


class ModelReply(BaseModel):
    """`kind`: image, video or audio. `parameters`: what its requests may set; `defaults`: what holds otherwise."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    pipeline: str
    kind: Literal["image", "video", "audio"]
    needs_image: bool
    size_multiple: int
    parameters: list[str]
    defaults: dict[str, Any]


class AdapterReply(BaseModel):
    """A loaded adapter; `parent`: the model that it changes."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelReply | AdapterReply]


class Health(BaseModel):
    status: Literal["ready", "starting", "draining", "failed", "degraded"]
    reason: str | None
    model: str | None


def headers_of(output: OmniRequestOutput) -> dict[str, str]:
    """The receipt as one line, and the request's id."""
    line = output.receipt.line() if output.receipt is not None else ""
    return {RECEIPT_HEADER: header_line(line), "X-Request-Id": output.request_id}


def header_line(text: str) -> str:
    """What a header may hold: printable ASCII on one line."""
    return "".join(c if c.isprintable() and c.isascii() else "?" for c in " ".join(text.split()))


def receipt_of(output: OmniRequestOutput) -> dict[str, Any]:
    return output.receipt.as_dict() if output.receipt is not None else {}
