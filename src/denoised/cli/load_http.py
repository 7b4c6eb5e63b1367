"""A little HTTP for the load generator: one request a connection, in the event loop, read piece by piece, so that
events count when they come. Nothing but the standard library: measuring a server needs no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from denoised.errors import InvalidConfigError

# Bytes that are read at once.
_PIECE = 2**16


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where a server is, and the key that it is asked with."""

    host: str
    port: int
    path: str = ""
    secure: bool = False
    key: str | None = None


def address(url: str, key: str | None = None) -> Address:
    """Of http[s]://host[:port][/path]; a path that ends with /v1 is taken without that.

    Raises:
        InvalidConfigError: it is none.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidConfigError(f"url={url!r:.80}: must be http[s]://host[:port].")
    secure = parts.scheme == "https"
    path = parts.path.rstrip("/").removesuffix("/v1")
    return Address(host=parts.hostname, port=port or (443 if secure else 80), path=path, secure=secure, key=key)


class Answer:
    """A status, and a body that is still coming."""

    def __init__(self, status: int, headers: dict[str, str], reader: asyncio.StreamReader) -> None:
        self.status, self._headers, self._reader = status, headers, reader

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self._pieces()])

    async def json(self) -> dict[str, Any]:
        """The body; empty if it is no JSON object."""
        try:
            found = json.loads(await self.read())
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The data of server-sent events, as they come."""
        rest = b""
        async for piece in self._pieces():
            *whole, rest = (rest + piece).split(b"\n\n")
            for block in whole:
                for line in block.splitlines():
                    if line.startswith(b"data: "):
                        yield json.loads(line.removeprefix(b"data: "))

    async def _pieces(self) -> AsyncIterator[bytes]:
        if self._headers.get("transfer-encoding") == "chunked":
            while size := int((await self._reader.readline()).partition(b";")[0], 16):
                yield await self._reader.readexactly(size)
                await self._reader.readline()
        elif "content-length" in self._headers:
            yield await self._reader.readexactly(int(self._headers["content-length"]))
        else:
            while piece := await self._reader.read(_PIECE):
                yield piece


@contextlib.asynccontextmanager
async def ask(place: Address, method: str, path: str, body: dict[str, Any] | None = None) -> AsyncIterator[Answer]:
    """Send a request; leaving hangs up.

    Raises:
        OSError, EOFError, ValueError: there is no server, it went away, or it does not speak HTTP.
    """
    secure = ssl.create_default_context() if place.secure else None
    reader, writer = await asyncio.open_connection(place.host, place.port, ssl=secure)
    try:
        writer.write(_head_and_body(place, method, path, body))
        await writer.drain()
        first = (await reader.readline()).split()
        if len(first) < 2:
            raise EOFError("it hung up")
        headers: dict[str, str] = {}
        while line := (await reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip().lower()
        yield Answer(int(first[1]), headers, reader)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _head_and_body(place: Address, method: str, path: str, body: dict[str, Any] | None) -> bytes:
    raw = b"" if body is None else json.dumps(body).encode()
    lines = [f"{method} {place.path}{path} HTTP/1.1", f"Host: {place.host}:{place.port}", "Connection: close"]
    lines += [f"Authorization: Bearer {place.key}"] if place.key else []
    lines += ["Content-Type: application/json", f"Content-Length: {len(raw)}"]
    return "\r\n".join([*lines, "", ""]).encode() + raw
