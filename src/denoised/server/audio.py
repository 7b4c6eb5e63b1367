"""POST /v1/audio/generate."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from denoised.media.save import save
from denoised.outputs import OmniRequestOutput
from denoised.server import forms
from denoised.server.answering import unless_gone
from denoised.server.bodies import AudioRequest
from denoised.server.replies import headers_of
from denoised.server.schema import ERRORS, body
from denoised.server.serving import Run
from denoised.server.within import place_of, serving_of

router = APIRouter(tags=["audio"], responses=ERRORS)
_FILE: dict[int | str, dict[str, Any]] = {200: {"content": {"audio/wav": {"schema": {"type": "string"}}}}}


@router.post("/v1/audio/generate", response_class=Response, responses=_FILE, openapi_extra=body(AudioRequest))
async def generate(request: Request) -> Response:
    """Make a sound and answer with it, as WAV; the receipt is in a header."""
    asked, _ = await forms.read(request, AudioRequest)
    place = place_of(request)
    place.check_kind("audio")
    place.one_output(asked)
    ask = place.ask(asked, text=asked.input, prefix="audio_", extra_args=place.extra_args(asked))
    return await unless_gone(request, _file(serving_of(request).run(ask), place.info.sample_rate))


async def _file(run: Run, sample_rate: int | None) -> Response:
    async with run:
        output = await run.output()
        raw = await asyncio.to_thread(wav, output, sample_rate)
    return Response(raw, media_type="audio/wav", headers=headers_of(output))


def wav(output: OmniRequestOutput, sample_rate: int | None) -> bytes:
    """The sound as a file's bytes."""
    with tempfile.TemporaryDirectory(prefix="denoised-audio-") as folder:
        [path] = save(output, Path(folder) / "audio.wav", sample_rate=sample_rate)
        return path.read_bytes()
