"""What every request passes before it meets a route, as plain ASGI. `app.py` has the order.

Errors leave in OpenAI's shape. Nothing here reads a body except to count it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from denoised.server import keys
from denoised.server.metrics import HttpMetrics
from denoised.server.problems import CLIENT_GONE, Refusal, unavailable
from denoised.server.serving import Serving
from denoised.server.settings import ServerConfig

_log = logging.getLogger(__name__)
# What anyone may ask, with keys or without: load balancers have none, and the playground asks for its own.
OPEN_PATHS = frozenset({"/health", "/"})
OPEN_FOLDER = "/playground/"
# Seconds of silence in the middle of a body.
PATIENCE = 60.0


class Count:
    """Outermost: one line in the metrics for each request, whatever becomes of it; a crash is a 500 in our shape."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status, began = CLIENT_GONE, time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._metrics.in_progress():
            try:
                await self._app(scope, receive, watched)
            except Exception:
                status = 500
                raise
            finally:
                self._metrics.done(scope["method"], _route(scope), status, time.perf_counter() - began)


def _route(scope: Scope) -> str:
    """The route's pattern: paths hold ids, and there is no end of those."""
    return getattr(scope.get("route"), "path", "other")


class Keys:
    """401 for who has no key, before anything of the request is read; else `tenant` in the request's state."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app, self._digests = app, config.api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or _is_open(scope["path"]):
            return await self._app(scope, receive, send)
        tenant = keys.tenant(self._digests, Headers(scope=scope).get("authorization"))
        if tenant is None:
            message = "the API key is missing or not known; send Authorization: Bearer <key>."
            answer = Refusal(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
            return await answer.response()(scope, receive, send)
        scope.setdefault("state", {})["tenant"] = tenant
        return await self._app(scope, receive, send)


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


class Gate:
    """503 while the model is being loaded, and for new work on the way out."""

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app, self._serving = app, serving

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/v1/") and not self._open(scope["method"]):
            answer = unavailable(f"the server is not ready: {self._serving.reason}; try again.")
            return await answer.response()(scope, receive, send)
        return await self._app(scope, receive, send)

    def _open(self, method: str) -> bool:
        status = self._serving.status
        return status == "ready" or (status == "draining" and method != "POST")


class Limit:
    """413 for a body that is too large, by its word or by its bytes; 408 for one that stops coming."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app, self._config = app, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        said = Headers(scope=scope).get("content-length", "0")
        if said.isdecimal() and int(said) > self._config.max_body:
            return await self._too_large().response()(scope, receive, send)
        return await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        size, more = 0, True

        async def counted() -> Message:
            nonlocal size, more
            if not more:  # the body is there: from here on it is only about hanging up, which may take long
                return await receive()
            try:
                async with asyncio.timeout(PATIENCE):
                    message = await receive()
            except TimeoutError as error:
                raise Refusal(408, f"nothing came for {PATIENCE:.0f} s; send the whole body.") from error
            size += len(message.get("body", b""))
            more = bool(message.get("more_body"))
            if size > self._config.max_body:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> Refusal:
        most = self._config.max_body_mb
        return Refusal(413, f"the body has more than {most} MiB; send less, or start with --max-body-mb.")


def tenant_of(scope: Scope | Any) -> str:
    """Whose request it is; everyone's, without keys."""
    with contextlib.suppress(KeyError):
        return str(scope["state"]["tenant"])
    return ""
