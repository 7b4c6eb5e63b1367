"""Work on behalf of a caller who may hang up: whoever hangs up has his work stopped, whatever the route.

`unless_gone` is for answers that are made in one piece, `EventStream` for server-sent events.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from denoised.errors import DenoisedError
from denoised.server.problems import CLIENT_GONE, Refusal, of_error
from denoised.server.serving import Run

T = TypeVar("T")
# Seconds of silence after which a comment keeps proxies from closing a stream.
_HEARTBEAT = 10.0
_STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class ClientGoneError(Exception):
    """Nobody is left who would read the answer."""


async def _hangs_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _first(work: Awaitable[T], receive: Receive) -> T:
    """The result of `work`, or ClientGoneError, which cancels it and waits until it has cleaned up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_hangs_up(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for other in (task, gone):
            other.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(task, gone, return_exceptions=True)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`.

    Raises:
        ClientGoneError: the caller hung up first; the work was stopped.
    """
    return await _first(work, request.receive)


def event(name: str, data: dict[str, Any]) -> bytes:
    """One server-sent event; OpenAI's carry their name in `type` too."""
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


class EventStream(Response):
    """Server-sent events of one run. What is refused before it was queued is an ordinary error answer."""

    media_type = "text/event-stream"

    def __init__(self, run: Run, render: Callable[[Run], AsyncIterator[bytes]], headers: dict[str, str]) -> None:
        super().__init__(headers={**_STREAM, **headers})
        del self.headers["content-length"]
        self._run, self._render = run, render

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientGoneError):
            await _first(self._answer(scope, receive, send), receive)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._run:
            try:
                await self._run.accepted()
            except (DenoisedError, Refusal) as error:
                return await of_error(error).response()(scope, receive, send)
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in _with_heartbeat(self._rendered()):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            return await send({"type": "http.response.body", "body": b""})

    async def _rendered(self) -> AsyncIterator[bytes]:
        """The events; an error is the last of them."""
        try:
            async for chunk in self._render(self._run):
                yield chunk
        except Exception as error:
            yield event("error", of_error(error).body())


class Watched(Response):
    """Server-sent events of what goes on without this caller; who hangs up ends the stream alone."""

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        super().__init__(headers=dict(_STREAM))
        del self.headers["content-length"]
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientGoneError):
            await _first(self._answer(send), receive)

    async def _answer(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for chunk in _with_heartbeat(self._chunks):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def _with_heartbeat(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """`chunks`, and a comment whenever none came for a while."""
    waiting: asyncio.Task[bytes] | None = None
    try:
        while True:
            waiting = waiting or asyncio.ensure_future(anext(chunks))
            done, _ = await asyncio.wait({waiting}, timeout=_HEARTBEAT)
            if not done:
                yield b": still here\n\n"
                continue
            try:
                chunk = waiting.result()
            except StopAsyncIteration:
                return
            waiting = None
            yield chunk
    finally:
        if waiting is not None:
            waiting.cancel()


async def gone(request: Request, error: Exception) -> Response:
    """The answer that nobody reads."""
    return Response(status_code=CLIENT_GONE)
