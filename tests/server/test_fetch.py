"""Pictures by URL: from public addresses only, whatever the name, the form of the address or the redirect."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from denoised.server import fetch
from denoised.server.problems import Refusal


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "255.255.255.255", "::1", "::", "fe80::1", "fc00::1", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "2002:a00:1::1"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not fetch.is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address: str) -> None:
    assert fetch.is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://127.0.0.1/x.png",
            "http://localhost:8091/metrics",
            "http://[::1]/x",
            "http://0/x",
            "http://2130706433/",
        ),
        *("http://0x7f.1/x", "https://user:word@example.com/x", "file:///etc/passwd", "ftp://example.com/x", "//x/y"),
        *("http://", "http://a:99999/", "http://[::1", "gopher://x", "http://exa mple/", "http://\u2100.example/"),
        *("http://169.254.169.254/latest/meta-data", "http://nothing.invalid/x.png"),
    ],
)
def test_urls_that_are_refused(url: str) -> None:
    with pytest.raises(Refusal) as caught:
        asyncio.run(fetch.fetch(url, param="url", max_bytes=100))
    assert caught.value.status_code == 400
    assert caught.value.param == "url"


Handler = Callable[[http.server.BaseHTTPRequestHandler], None]


@contextlib.contextmanager
def site(answer: Handler) -> Iterator[int]:
    """A web server on this machine."""

    class Answering(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            with contextlib.suppress(ConnectionError):
                answer(self)

        def log_message(self, *arguments: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_port
        server.shutdown()


@pytest.fixture
def loopback_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's own address stands for the internet; all others keep what they are."""
    honest = fetch.is_public
    monkeypatch.setattr(fetch, "is_public", lambda a: ipaddress.ip_address(a).is_loopback or honest(a))


def get(port: int, host: str = "127.0.0.1", max_bytes: int = 100) -> bytes:
    return asyncio.run(fetch.fetch(f"http://{host}:{port}/x?y=1", param="url", max_bytes=max_bytes))


def send(handler: http.server.BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


@pytest.mark.usefixtures("loopback_is_public")
def test_fetches_what_is_there() -> None:
    asked = []

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        asked.append((handler.path, handler.headers["Host"]))
        send(handler, b"picture")

    with site(answer) as port:
        assert get(port) == b"picture"
    assert asked == [("/x?y=1", f"127.0.0.1:{port}")]


@pytest.mark.usefixtures("loopback_is_public")
def test_redirects_are_checked_like_any_other_address() -> None:
    def to(place: str) -> Handler:
        return lambda handler: send(handler, b"", 302, Location=place)

    with site(lambda handler: send(handler, b"end")) as end, site(to(f"http://127.0.0.1:{end}/z")) as port:
        assert get(port) == b"end"
    for place in ("http://169.254.169.254/latest", "file:///etc/passwd", "http://10.0.0.1/", ""):
        with site(to(place)) as port, pytest.raises(Refusal):
            get(port)


@pytest.mark.usefixtures("loopback_is_public")
def test_too_large_too_slow_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "PATIENCE", 1.0)

    def drip(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b"x")
            time.sleep(0.05)

    with site(lambda handler: send(handler, b"x" * 101)) as port, pytest.raises(Refusal, match="more than 100 bytes"):
        get(port)
    with site(lambda handler: send(handler, b"", 404)) as port, pytest.raises(Refusal, match="gives no picture"):
        get(port)
    with site(drip) as port, pytest.raises(Refusal, match="longer than 1 s"):
        get(port)


def test_name_with_one_private_address_is_refused_and_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that has a public and a private address; and one that would change between the check and the call."""
    calls = []

    def resolve(host: str, port: int, **kind: Any) -> list[Any]:
        calls.append(host)
        return [(0, 0, 0, "", (address, port)) for address in ("8.8.8.8", "10.0.0.1")]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(Refusal, match="no public address"):
        get(80, host="two.example")
    assert calls == ["two.example"]
    monkeypatch.setattr(fetch, "is_public", lambda a: a == "8.8.8.8" or a == "10.0.0.1")
    called = []

    def connect(address: Any, timeout: float) -> Any:
        called.append(address)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(Refusal, match="gives no picture"):
        get(80, host="two.example")
    assert called == [("8.8.8.8", 80)]
    assert calls == ["two.example"] * 2
