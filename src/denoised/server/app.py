"""The application: its routes, and the order of what stands before them, written once."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from denoised import __version__
from denoised.errors import InvalidRequestError, QueueFullError, RequestAbortedError, RequestTimeoutError
from denoised.server import (
    answering,
    audio,
    chat,
    complaints,
    drafts,
    images,
    info,
    lora_routes,
    playground,
    schema,
    video_events,
    videos,
)
from denoised.server.bodies import AudioRequest, ChatRequest, EditRequest, ImageRequest, VideoRequest
from denoised.server.drafts import ContinueRequest, DraftRequest
from denoised.server.jobs import JobStore
from denoised.server.kept_drafts import KeptDrafts
from denoised.server.metrics import HttpMetrics
from denoised.server.middleware import Count, Gate, Keys, Limit
from denoised.server.problems import Refusal, of_error
from denoised.server.replies import RECEIPT_HEADER
from denoised.server.serving import Serving
from denoised.server.settings import ServerConfig
from denoised.server.webhooks import Webhooks
from denoised.server.working import Jobs

_BODIES = (ImageRequest, EditRequest, DraftRequest, ContinueRequest, VideoRequest, AudioRequest, ChatRequest)
_OURS = (InvalidRequestError, QueueFullError, RequestAbortedError, RequestTimeoutError)


def order(config: ServerConfig, serving: Serving, metrics: HttpMetrics) -> list[Middleware]:
    """What a request passes, from the outside in."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=config.cors_origin,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=[RECEIPT_HEADER, "X-Request-Id", "Retry-After"],
    )
    return [
        Middleware(Count, metrics=metrics),  # sees all answers, also those of the layers below
        *([cors] if config.cors_origin else []),  # browsers ask without a key whether they may ask
        Middleware(Keys, config=config),  # nothing of a stranger's request is read
        Middleware(Gate, serving=serving),  # nor of one that could not run
        Middleware(Limit, config=config),  # the last before somebody reads the body
    ]


def build_app(serving: Serving, store: JobStore) -> FastAPI:
    """The application of one server."""
    config = serving.config
    metrics = HttpMetrics(lambda: serving.engine.stats() if serving.engine is not None else None)
    app = FastAPI(
        title="denoised",
        version=__version__,
        description="Images, videos and sound from diffusion models, in the shapes of OpenAI's API.",
        middleware=order(config, serving, metrics),
        docs_url=None,
        redoc_url=None,
    )
    webhooks = Webhooks(config.webhook_secret, allow_private=config.allow_private_webhooks)
    app.state.serving, app.state.metrics, app.state.jobs = serving, metrics, Jobs(store, webhooks)
    app.state.drafts = KeptDrafts(config)
    for part in (images, drafts, videos, video_events, audio, chat, lora_routes, info, playground):
        app.include_router(part.router)
    _answer_errors(app)
    app.openapi = lambda: schema.openapi(app, _BODIES)  # type: ignore[method-assign]
    return app


def _answer_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(answering.ClientGoneError, answering.gone)
    for cls in _OURS:
        app.add_exception_handler(cls, _ours)
    app.add_exception_handler(Exception, _crash)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, Refusal):
        return error.response()
    words = {404: f"there is no route {request.url.path:.80}.", 405: f"{request.method} is no method of this route."}
    message = words.get(error.status_code, str(error.detail))
    return Refusal(error.status_code, message, headers=error.headers).response()


async def _validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return complaints.refusal(error.errors()).response()


async def _ours(request: Request, error: Exception) -> Response:
    return of_error(error).response()


async def _crash(request: Request, error: Exception) -> JSONResponse:
    """A bug of ours; its traceback is in the log, not in the answer."""
    return Refusal(500, "the server failed at this request; its log says where.", code="internal").response()
