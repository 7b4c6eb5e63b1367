"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, in vLLM's shapes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from denoised.lora_request import LoRARequest
from denoised.server import forms
from denoised.server.fields import Closed
from denoised.server.loras import check_path
from denoised.server.problems import Refusal, invalid
from denoised.server.schema import ERRORS, body
from denoised.server.within import serving_of

MOST_CHARS = 4096
_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **ERRORS}
router = APIRouter(tags=["adapters"])


class LoadRequest(Closed):
    """POST /v1/load_lora_adapter."""

    lora_name: str = Field(description="what requests will call it", min_length=1, max_length=200)
    lora_path: str = Field(
        description="safetensors file, or its folder, below one of the server's", min_length=1, max_length=MOST_CHARS
    )
    load_inplace: bool | None = Field(None, description="in place of one of this name")


class UnloadRequest(Closed):
    """POST /v1/unload_lora_adapter."""

    lora_name: str = Field(description="what it was loaded as", min_length=1, max_length=200)
    lora_int_id: int | None = Field(None, description="taken for vLLM's callers; the name decides")


@router.post("/v1/load_lora_adapter", response_class=Response, responses=_TEXT, openapi_extra=body(LoadRequest))
async def load(request: Request) -> Response:
    """Read an adapter, for requests that name it in `lora_request`, or as their `model`."""
    asked, _ = await forms.read(request, LoadRequest)
    serving = serving_of(request)
    engine = serving.loaded()
    check_path(asked.lora_path, serving.config)
    if asked.lora_name in (serving.name, engine.info.model):
        raise invalid(f"lora_name={asked.lora_name!r:.80}: that is the model's name; give another.")
    if asked.lora_name in engine.loras and not asked.load_inplace:
        raise invalid(f"lora_name={asked.lora_name!r:.80} is loaded already; set load_inplace=true, or unload it.")
    await engine.load_lora(LoRARequest(asked.lora_name, lora_path=asked.lora_path))
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=Response, responses=_TEXT, openapi_extra=body(UnloadRequest))
async def unload(request: Request) -> Response:
    """Forget an adapter; requests that run with it go on."""
    asked, _ = await forms.read(request, UnloadRequest)
    engine = serving_of(request).loaded()
    if asked.lora_name not in engine.loras:
        message = f"lora_name={asked.lora_name!r:.80}: no adapter is loaded under it; /v1/models lists those that are."
        raise Refusal(404, message, param="lora_name", code="lora_not_found")
    await engine.unload_lora(asked.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{asked.lora_name}' removed successfully.")
