"""What operators and clients ask of a server: /v1/models, /health, /metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from denoised.runtime.model_info import RESERVED
from denoised.server.fields import SAMPLING
from denoised.server.problems import Refusal
from denoised.server.replies import Health, ModelList, ModelReply
from denoised.server.schema import ERRORS
from denoised.server.serving import Serving
from denoised.server.within import metrics_of, serving_of

router = APIRouter(tags=["server"])
_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.get("/health", responses={200: {"model": Health}, 503: {"model": Health}})
async def health(request: Request) -> Response:
    """200 when a request would run now: the model is loaded, a first request has run, all ranks are there."""
    serving = serving_of(request)
    reason = await asyncio.to_thread(serving.not_ready_because)  # the engine's own thread is asked
    status = "degraded" if reason and serving.status == "ready" else serving.status
    model = serving.name if serving.engine is not None else None
    return JSONResponse({"status": status, "reason": reason, "model": model}, 200 if reason is None else 503)


@router.get("/metrics", response_class=Response, responses=_TEXT)
async def metrics(request: Request) -> Response:
    """Prometheus: queue, ticks, rows, steps, seconds of each stage, errors by kind; requests by route and status."""
    return Response(await asyncio.to_thread(metrics_of(request).text), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models", responses={200: {"model": ModelList}, **ERRORS})
async def list_models(request: Request) -> Response:
    """The served model, and the adapters that are loaded."""
    shown = _shown(serving_of(request))
    return JSONResponse({"object": "list", "data": [shown, *_adapters(serving_of(request))]})


@router.get("/v1/models/{model:path}", responses={200: {"model": ModelReply}, **ERRORS})
async def retrieve_model(request: Request, model: str) -> Response:
    """The served model by its name."""
    shown = _shown(serving_of(request))
    if model != shown["id"]:
        message = f"model={model!r:.80}: this server serves {shown['id']}."
        raise Refusal(404, message, param="model", code="model_not_found")
    return JSONResponse(shown)


def _adapters(serving: Serving) -> list[dict[str, Any]]:
    assert serving.engine is not None, "the gate is closed until it is there"
    common = {"object": "model", "created": serving.since, "owned_by": "denoised", "parent": serving.name}
    return [{"id": name, **common} for name in serving.engine.loras]


def _shown(serving: Serving) -> dict[str, Any]:
    assert serving.engine is not None, "the gate is closed until it is there"
    info = serving.engine.info
    ours = {f.name for f in SAMPLING}
    return {
        "id": serving.name,
        "object": "model",
        "created": serving.since,
        "owned_by": "denoised",
        "pipeline": info.pipeline,
        "kind": info.kind,
        "needs_image": info.needs_image,
        "size_multiple": info.size_multiple,
        "parameters": sorted((info.parameters - RESERVED) | (ours & {"seed", "num_outputs_per_prompt"})),
        "defaults": {k: v for k, v in info.defaults.items() if isinstance(v, int | float | str | bool)},
    }
