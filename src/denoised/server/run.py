"""A server's life: listen, load, warm up, say so, serve, drain, end.

It listens before the model is there, so that /health can say what it waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from denoised.errors import EngineError, InvalidConfigError
from denoised.server.app import build_app
from denoised.server.jobs import JobStore, MemoryStore
from denoised.server.serving import Engine, Serving, warm_up
from denoised.server.settings import ServerConfig
from denoised.server.store import SqliteStore
from denoised.server.warming import first_ask

# Seconds in which connections end after the last request; what has not ended then is cut.
_LAST_WORDS = 10
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Uvicorn(uvicorn.Server):
    """Signals are ours: the first drains, while answers are still given."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """One server. `make_engine` is called once, on a thread of its own."""

    def __init__(self, make_engine: Callable[[], Engine], config: ServerConfig, *, num_ranks: int) -> None:
        self._make_engine, self._config, self._num_ranks = make_engine, config, num_ranks
        self.serving = Serving(config)
        self._app = build_app(self.serving, _store(config))
        self._stopping = asyncio.Event()
        self.socket = bind(config.host, config.port)
        self.port = self.socket.getsockname()[1]

    async def run(self, say: Callable[[str], None]) -> None:
        """Serve until `stop`; `say` gets the line that says that the server is ready.

        Raises:
            DenoisedError: the model could not be loaded, or the first request failed.
        """
        http = _Uvicorn(_uvicorn_config(self._app))
        answering = asyncio.create_task(http.serve(sockets=[self.socket]))
        try:
            await self._until_stopped(self._start(say))
            await self._until_stopped(self._stopping.wait())
            await self.serving.drain(self._config.drain_timeout)
        finally:
            await self._app.state.jobs.close()
            http.should_exit = True
            await answering
            if self.serving.engine is not None:
                await asyncio.to_thread(self.serving.engine.close)

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def stop(self) -> None:
        """Refuse what is new, finish what runs, end. Call it on the loop's thread."""
        self._stopping.set()

    async def _until_stopped(self, work: Any) -> None:
        """`work`, or as much of it as there is time for."""
        task, stopped = asyncio.ensure_future(work), asyncio.create_task(self._stopping.wait())
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if task.done():
            task.result()
        task.cancel()

    async def _start(self, say: Callable[[str], None]) -> None:
        began = time.monotonic()
        serving = self.serving
        engine = serving.engine = await asyncio.to_thread(self._make_engine)
        if not self._config.skip_warm_up:
            serving.reason = "a first request is being run"
            problem = await warm_up(serving, first_ask(engine.info))
            if problem is not None:
                raise EngineError(f"the first request failed ({problem}); --skip-warm-up starts without one.")
        serving.status, serving.reason = "ready", ""
        self._app.state.jobs.go_on(serving)
        say(self._ready_line(engine, time.monotonic() - began))

    def _ready_line(self, engine: Engine, seconds: float) -> str:
        ranks = f"{self._num_ranks} rank" + ("s" if self._num_ranks > 1 else "")
        host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
        return (
            f"denoised serves {self.serving.name} ({engine.info.pipeline}) at http://{host}:{self.port}, "
            f"{ranks} on {engine.info.device}, ready after {seconds:.1f} s"
        )


def _store(config: ServerConfig) -> JobStore:
    """Where jobs are."""
    if config.jobs_folder is None:
        return MemoryStore(config.max_jobs)
    return SqliteStore(config.jobs_folder, limit=config.max_jobs, max_age=config.job_days * 86_400)


def serve(
    make_engine: Callable[[], Engine], config: ServerConfig, *, num_ranks: int, say: Callable[[str], None]
) -> None:
    """Serve in this process until a signal comes. The first drains; the second ends at once.

    Raises:
        InvalidConfigError: the address cannot be listened on.
        DenoisedError: the model could not be loaded.
    """
    asyncio.run(_serve(make_engine, config, num_ranks, say))


async def _serve(
    make_engine: Callable[[], Engine], config: ServerConfig, num_ranks: int, say: Callable[[str], None]
) -> None:
    server = Server(make_engine, config, num_ranks=num_ranks)
    loop = asyncio.get_running_loop()

    def heard(number: int) -> None:
        if server.stopping:
            os._exit(128 + number)
        if server.serving.status == "starting":
            os._exit(0)  # loading cannot be interrupted, and nobody waits for anything yet
        server.stop()

    for number in _SIGNALS:
        loop.add_signal_handler(number, heard, number)
    await server.run(say)


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        InvalidConfigError: it cannot.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        made = socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidConfigError(f"host={host!r}, port={port}: cannot listen there ({reason}).") from error
    made.setblocking(False)
    return made


def _uvicorn_config(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_LAST_WORDS,
        ws="none",
    )
