"""Pictures by URL. Off unless the server's settings allow it, and then from public addresses only.

A name is resolved once, every address it has is checked, and the connection goes to a checked address: a name that
resolves to something else a moment later gains nothing. Redirects are followed by the same rules.
"""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import SplitResult, urljoin, urlsplit

from denoised.server.problems import invalid

MAX_REDIRECTS = 3
# Seconds of one fetch: of each silence in it, and of all of it.
SILENCE, PATIENCE = 5.0, 20.0
_PORTS = {"http": 80, "https": 443}
_CHUNK = 64 * 1024


async def fetch(url: str, *, param: str, max_bytes: int) -> bytes:
    """The body at `url`.

    Raises:
        Refusal: not public, not there, too large or too slow.
    """
    try:
        async with asyncio.timeout(PATIENCE):
            return await asyncio.to_thread(_follow, url, param, max_bytes, time.monotonic() + PATIENCE)
    except TimeoutError as error:
        raise invalid(f"{param}: the picture took longer than {PATIENCE:.0f} s; upload it.", param=param) from error


def _follow(url: str, param: str, max_bytes: int, deadline: float) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        parts = parts_of(url, param)
        try:
            body, location = _get(parts, address_of(parts, param), param, max_bytes, deadline)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise invalid(f"{param}: {parts.hostname:.60} gives no picture; upload it.", param=param) from error
        if location is None:
            return body
        url = urljoin(url, location)
    raise invalid(f"{param}: more than {MAX_REDIRECTS} redirects; upload the picture.", param=param)


def parts_of(url: str, param: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        if parts.scheme in _PORTS and parts.hostname and parts.username is None and parts.port != 0:
            return parts
    except ValueError:
        pass  # a port that is no number, brackets that do not close
    raise invalid(f"{param}={url!r:.60}: must be an http(s) URL without a user, or a data: URL.", param=param)


def address_of(parts: SplitResult, param: str, *, public: bool = True) -> str:
    """An address of the host, if all that it has are public, or need not be.

    Raises:
        Refusal: one of them is not, or there is none.
    """
    port = parts.port or _PORTS[parts.scheme]
    try:
        found = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise invalid(f"{param}: {parts.hostname:.60} is not known; upload the picture.", param=param) from error
    addresses = [str(entry[4][0]).partition("%")[0] for entry in found]
    if not addresses or (public and not all(is_public(address) for address in addresses)):
        raise invalid(f"{param}: {parts.hostname:.60} is no public address; upload the picture.", param=param)
    return addresses[0]


def is_public(address: str) -> bool:
    """Whether anyone on the internet could reach it, in whatever form it hides an IPv4 address."""
    ip = ipaddress.ip_address(address)
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def _get(parts: SplitResult, address: str, param: str, max_bytes: int, deadline: float) -> tuple[bytes, str | None]:
    """The body, or where it has moved to."""
    connection = connection_to(parts, address)
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", path, headers={"Host": parts.netloc, "Accept": "image/*"})
        with connection.getresponse() as answer:
            if answer.status in (301, 302, 303, 307, 308):
                return b"", answer.getheader("Location") or ""
            if answer.status != 200:
                raise http.client.HTTPException(f"status {answer.status}")
            return _read(answer, param, max_bytes, deadline), None
    finally:
        connection.close()


def connection_to(parts: SplitResult, address: str) -> http.client.HTTPConnection:
    """A connection to that address; certificates are checked against the host's name."""
    port = parts.port or _PORTS[parts.scheme]
    connection = http.client.HTTPConnection(parts.hostname or "", port, timeout=SILENCE)
    connection.sock = socket.create_connection((address, port), timeout=SILENCE)
    if parts.scheme == "https":
        with connection.sock as raw:  # closed if the handshake fails; wrapping takes it over otherwise
            connection.sock = ssl.create_default_context().wrap_socket(raw, server_hostname=parts.hostname)
    return connection


def _read(answer: http.client.HTTPResponse, param: str, max_bytes: int, deadline: float) -> bytes:
    body = bytearray()
    while chunk := answer.read1(_CHUNK):
        body += chunk
        if len(body) > max_bytes:
            raise invalid(f"{param}: the picture has more than {max_bytes} bytes; send a smaller one.", param=param)
        if time.monotonic() > deadline:
            raise TimeoutError
    return bytes(body)
