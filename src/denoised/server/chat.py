"""POST /v1/chat/completions: one message of the user in, pictures in `message.content` out."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from denoised.server import forms, pictures
from denoised.server.answering import unless_gone
from denoised.server.bodies import ChatRequest, TextPart
from denoised.server.problems import invalid
from denoised.server.replies import ChatReply, headers_of, receipt_of
from denoised.server.schema import ERRORS, body
from denoised.server.serving import Run
from denoised.server.uploads import input_images, of_url
from denoised.server.within import place_of, serving_of

router = APIRouter(tags=["chat"], responses=ERRORS)


@router.post("/v1/chat/completions", responses={200: {"model": ChatReply}}, openapi_extra=body(ChatRequest))
async def completions(request: Request) -> Response:
    """Images as a chat: the text of the message is the prompt, its pictures are what an editing model starts from."""
    asked, _ = await forms.read(request, ChatRequest)
    place = place_of(request)
    place.check_kind("image")
    text, urls = _parts(asked)
    raw = [await of_url(request, url, "messages") for url in urls]
    media = await input_images(request, raw, [], param="messages") if raw else None
    ask = place.ask(asked, text=text, prefix="chatcmpl_", n=asked.n, size=asked.size, media=media)
    return await unless_gone(request, _reply(serving_of(request).run(ask), place.name))


def _parts(asked: ChatRequest) -> tuple[str, list[str]]:
    """The prompt, and where the pictures are."""
    content = asked.messages[0].content
    if isinstance(content, str):
        return content, []
    texts = [part.text for part in content if isinstance(part, TextPart)]
    if not texts:
        raise invalid("messages has no text; say what to make.")
    return "\n".join(texts), [part.image_url.url for part in content if not isinstance(part, TextPart)]


async def _reply(run: Run, model: str) -> Response:
    async with run:
        output = await run.output()
        choices = [await asyncio.to_thread(_choice, number, image) for number, image in enumerate(output.images)]
    reply = {
        "id": output.request_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": choices,
        "receipt": receipt_of(output),
    }
    return JSONResponse(reply, headers=headers_of(output))


def _choice(number: int, image: Any) -> dict[str, Any]:
    """One output; layered models give several pictures for it."""
    encoded = pictures.encode_all(pictures.flat([image]), "png", None, opaque=False)
    content = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{raw}"}} for raw in encoded]
    return {"index": number, "message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
