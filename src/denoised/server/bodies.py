"""The bodies of requests, a class for each route: OpenAI's fields that can be honoured, and our own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from denoised.server.fields import Closed, RequestFields

_SIZE = r"^(auto|[1-9][0-9]{0,5}x[1-9][0-9]{0,5})$"
Size = Annotated[str, Field(pattern=_SIZE, description="WIDTHxHEIGHT in pixels; auto: the model's own")]
Format = Literal["png", "jpeg", "webp"]
# OpenAI's bound.
MOST_PARTIAL_IMAGES = 3


class ImageFields(RequestFields):
    """What asking for images and asking for edits have in common."""

    prompt: str = Field(description="what to make")
    n: int | None = Field(None, ge=1, description="images; default 1")
    size: Size | None = None
    output_format: Format | None = Field(None, description="default png")
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp; default 95")
    background: Literal["transparent", "opaque", "auto"] | None = Field(
        None, description="transparent: models with an alpha channel only"
    )
    quality: Literal["auto"] | None = Field(None, description="use num_inference_steps")
    response_format: Literal["b64_json"] | None = Field(None, description="the server keeps no files to link to")
    stream: bool | None = Field(None, description="server-sent events: progress, partial images, the images")
    partial_images: int | None = Field(
        None, ge=0, le=MOST_PARTIAL_IMAGES, description="previews of each image in a stream; needs stream=true"
    )

    @model_validator(mode="after")
    def _partial_images_need_a_stream(self) -> ImageFields:
        if self.partial_images and not self.stream:
            raise ValueError(f"partial_images={self.partial_images} come in a stream; set stream=true")
        return self


class ImageRequest(ImageFields):
    """POST /v1/images/generations."""


class EditRequest(ImageFields):
    """POST /v1/images/edits, beside the uploads `image` (one or several) and `mask`."""

    url: list[str] | None = Field(
        None, description="pictures as data: URLs, or, if the server may fetch them, as http(s) URLs"
    )


class ImageReference(Closed):
    image_url: str = Field(description="a data: URL, or, if the server may fetch it, an http(s) URL")


class VideoRequest(RequestFields):
    """POST /v1/videos and /v1/videos/sync; as JSON, or as a form with the upload `input_reference`."""

    prompt: str = Field(description="what to make")
    seconds: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,3}$")] | Annotated[float, Field(gt=0, le=9999)] | None = (
        Field(None, description="length; the nearest number of frames that the model can make")
    )
    size: Size | None = None
    input_reference: ImageReference | None = Field(None, description="the picture to start from")
    partial_images: int | None = Field(
        None, ge=0, le=MOST_PARTIAL_IMAGES, description="previews of a job's first frame among its events"
    )
    webhook: Annotated[str, Field(max_length=2000)] | None = Field(
        None, description="http(s) URL that is told, signed, when the job is done"
    )


class AudioRequest(RequestFields):
    """POST /v1/audio/generate."""

    input: str = Field(description="what to make")
    audio_length: float | None = Field(None, gt=0, le=9999, description="seconds, where the model takes a length")
    response_format: Literal["wav"] | None = None


class TextPart(Closed):
    type: Literal["text"]
    text: str


class ImageUrl(Closed):
    url: str = Field(description="a data: URL, or, if the server may fetch it, an http(s) URL")


class ImagePart(Closed):
    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(Closed):
    role: Literal["user"] = Field(description="a diffusion model takes one message, of the user")
    content: str | Annotated[list[Part], Field(min_length=1)]


class ChatRequest(RequestFields):
    """POST /v1/chat/completions: one message of the user, with pictures if the model edits them."""

    messages: list[Message] = Field(min_length=1, max_length=1)
    n: int | None = Field(None, ge=1, description="choices, one image each; default 1")
    size: Size | None = None
    modalities: list[Literal["image"]] | None = Field(None, min_length=1, max_length=1)
    stream: Literal[False] | None = Field(None, description="use /v1/images/generations for a stream")
    extra_body: dict[str, Any] | None = Field(
        None, description="the parameters once more, for callers that write OpenAI's extra_body into the body itself"
    )

    @model_validator(mode="before")
    @classmethod
    def _unpack(cls, body: Any) -> Any:
        """Fields of `extra_body` are fields of the body."""
        if not isinstance(body, dict) or not isinstance(body.get("extra_body"), dict):
            return body
        inner, outer = body["extra_body"], {k: v for k, v in body.items() if k != "extra_body"}
        twice = [name for name in inner if name in outer or name == "extra_body"]
        if twice:
            raise ValueError(f"{twice[0]} is given twice, also in extra_body; give it once")
        return outer | inner
