"""A real server on a thread: its own event loop, uvicorn on a free port, a real engine."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
from openai import AsyncOpenAI, OpenAI

from denoised import AsyncOmni
from denoised.runtime.stats import Stats
from denoised.server.run import Server
from denoised.server.settings import ServerConfig

KEY, OTHER_KEY = "key-of-a", "key-of-b"


@dataclass(kw_only=True)
class Live:
    """A server that is ready. `line` is what it said then."""

    server: Server
    line: str
    key: str | None
    closing: contextlib.ExitStack

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.port}"

    @property
    def engine(self) -> Any:
        return self.server.serving.engine

    def stats(self) -> Stats:
        made: Stats = self.engine.stats()
        return made

    @functools.cached_property
    def http(self) -> httpx2.Client:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return self.closing.enter_context(httpx2.Client(base_url=self.url, headers=headers, timeout=120))

    @functools.cached_property
    def client(self) -> OpenAI:
        return self.closing.enter_context(self.client_of(self.key or "none"))

    def client_of(self, key: str) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, timeout=120, max_retries=0)

    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", timeout=120, max_retries=0)

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> float:
        """Wait; gives how long it took."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds
            time.sleep(0.01)
        return time.monotonic() - began

    def idle(self) -> bool:
        stats = self.stats()
        return stats.running == stats.queued == 0


@contextlib.contextmanager
def live(model: str | None = None, *, key: str | None = None, **settings: Any) -> Iterator[Live]:
    """A server for `model`; `settings` are the server's where it has the name, else the engine's."""
    names = ServerConfig.__dataclass_fields__
    own = {k: v for k, v in settings.items() if k in names}
    rest = {"num_threads": 1, **{k: v for k, v in settings.items() if k not in names}}
    config = ServerConfig(port=0, **own)
    ready, made, problems = threading.Event(), [], []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        server = Server(lambda: AsyncOmni(model, **rest), config, num_ranks=1)
        made.append((loop, server))

        def say(line: str) -> None:
            made.append(line)
            ready.set()

        await server.run(say)

    def main() -> None:
        try:
            asyncio.run(run())
        except BaseException as error:
            problems.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=main, name="server")
    thread.start()
    ready.wait()
    assert not problems, problems
    loop, server = made[0]
    try:
        with contextlib.ExitStack() as closing:
            yield Live(server=server, line=made[1], key=key, closing=closing)
    finally:
        loop.call_soon_threadsafe(server.stop)
        thread.join(timeout=60)
        assert not thread.is_alive()
        assert not problems, problems
