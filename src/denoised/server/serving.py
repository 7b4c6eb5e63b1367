"""A server's state: its engine, from loading to draining, and what runs in it on behalf of HTTP requests.

Knows nothing of routes. The engine is what `AsyncOmni` is, by its methods alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol

from denoised.config import EngineConfig
from denoised.errors import one_line
from denoised.lora_request import LoRARequest
from denoised.outputs import OmniRequestOutput, Preview, Progress, Saved
from denoised.request import OmniDiffusionSamplingParams, Prompt, Service
from denoised.runtime.model_info import ModelInfo
from denoised.runtime.stats import Stats
from denoised.server.asks import Ask, Place
from denoised.server.problems import of_kind, unavailable
from denoised.server.settings import ServerConfig

Event = Progress | Preview | Saved | OmniRequestOutput
Status = Literal["starting", "ready", "draining", "failed"]
# Seconds within which an engine refuses what it will not queue. Later refusals are errors of the request itself.
ACCEPTANCE = 0.5


class Engine(Protocol):
    """What a server needs of `AsyncOmni`."""

    config: EngineConfig

    @property
    def info(self) -> ModelInfo: ...

    def generate(
        self,
        prompt: Prompt,
        sampling_params: OmniDiffusionSamplingParams | None = None,
        *,
        request_id: str | None = None,
        service: Service = ...,
    ) -> AsyncIterator[Event]: ...

    def resume(
        self, checkpoint: Any, *, request_id: str | None = None, service: Service = ...
    ) -> AsyncIterator[Event]: ...

    @property
    def loras(self) -> list[str]: ...

    async def load_lora(self, lora: LoRARequest) -> None: ...

    async def unload_lora(self, name: str) -> None: ...

    def stats(self) -> Stats: ...

    def close(self) -> None: ...


class Serving:
    """One server. `engine` is None until it is loaded."""

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.engine: Engine | None = None
        self.since = int(time.time())
        self.status: Status = "starting"
        self.reason = "the model is being loaded"
        self._runs: set[Run] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_running(self) -> int:
        """Requests of HTTP callers and of jobs that are in the engine."""
        return len(self._runs)

    @property
    def name(self) -> str:
        """What the model is called; of a local folder, not where it lies."""
        assert self.engine is not None
        model = self.config.served_model_name or self.engine.info.model
        return Path(model).name if Path(model).is_absolute() else model

    def place(self, tenant: str) -> Place:
        engine = self.loaded()
        loras = tuple(engine.loras)
        return Place(info=engine.info, name=self.name, config=self.config, tenant=tenant, loras=loras)

    def loaded(self) -> Engine:
        """The engine, if it takes requests.

        Raises:
            Refusal: it is being loaded, failed, or the server is on its way out.
        """
        if self.engine is None or self.status in ("draining", "failed"):
            raise unavailable(f"the server is not ready: {self.reason}; try again.")
        return self.engine

    def not_ready_because(self) -> str | None:
        """Why requests would not run now; None if they would."""
        if self.status != "ready" or self.engine is None:
            return self.reason
        down = [str(replica.replica) for replica in self.engine.stats().replicas if not replica.ready]
        return f"ranks are down and being started again (replica {', '.join(down)})" if down else None

    def run(self, ask: Ask, checkpoint: Any = None) -> Run:
        """One request, from its checkpoint if there is one; enter it to start it, leave it to end it wherever it
        stands."""
        return Run(self, self.loaded(), ask, checkpoint)

    def entered(self, run: Run) -> None:
        self._runs.add(run)
        self._idle.clear()

    def left(self, run: Run) -> None:
        self._runs.discard(run)
        if not self._runs:
            self._idle.set()

    async def drain(self, seconds: float) -> bool:
        """Refuse what is new and wait for what runs; False if some was still running after so long."""
        self.status, self.reason = "draining", "it is shutting down"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        return self._idle.is_set()


class Run:
    """One request in the engine, as its events. Leaving it aborts what is not done."""

    def __init__(self, serving: Serving, engine: Engine, ask: Ask, checkpoint: Any = None) -> None:
        self.ask, self.serving, self._engine, self._checkpoint = ask, serving, engine, checkpoint
        self._events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        self._something = asyncio.Event()
        self._refused: Exception | None = None
        self._pump: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Run:
        self.serving.entered(self)
        self._pump = asyncio.create_task(self._listen(), name=f"run-{self.ask.request_id}")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.end()

    async def end(self) -> None:
        """End it wherever it stands; once more does no harm."""
        assert self._pump is not None
        self._pump.cancel()
        try:
            await asyncio.wait([self._pump])
        finally:  # also if who ends it is ended himself
            self.serving.left(self)

    async def _listen(self) -> None:
        ask = self.ask
        if self._checkpoint is None:
            events = self._engine.generate(ask.prompt, ask.params, request_id=ask.request_id, service=ask.service)
        else:
            events = self._engine.resume(self._checkpoint, request_id=ask.request_id, service=ask.service)
        try:
            async for event in events:
                self._put(event)
        except Exception as error:
            self._put(error)
        finally:
            await events.aclose()  # type: ignore[attr-defined]

    def _put(self, event: Event | Exception) -> None:
        if isinstance(event, Exception) and not self._something.is_set():
            self._refused = event
        self._events.put_nowait(event)
        self._something.set()

    async def accepted(self) -> None:
        """Return when the request is queued.

        Raises:
            InvalidRequestError, QueueFullError: it was not.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ACCEPTANCE):
                await self._something.wait()
        if self._refused is not None:
            raise self._refused

    async def events(self) -> AsyncIterator[Event]:
        """Everything up to the output, which is the last and has no error.

        Raises:
            Refusal and the engine's errors: as the request's error says.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            if isinstance(event, OmniRequestOutput) and event.error is not None:
                raise of_kind(event.error_kind, event.error)
            if isinstance(event, OmniRequestOutput):
                yield self._named(event)
                return
            yield event

    def _named(self, output: OmniRequestOutput) -> OmniRequestOutput:
        """With the model's name in the receipt, where a folder would tell callers about this machine."""
        if output.receipt is None:
            return output
        return replace(output, receipt=replace(output.receipt, model=self.serving.name))

    async def output(self) -> OmniRequestOutput:
        """The result; what happens before it is nobody's."""
        async for event in self.events():
            if isinstance(event, OmniRequestOutput):
                return event
        raise AssertionError("the last event is the output")


async def warm_up(serving: Serving, ask: Ask) -> str | None:
    """Run a first request; what went wrong, if something did."""
    assert serving.engine is not None
    try:
        async with Run(serving, serving.engine, ask) as run:
            await run.output()
    except Exception as error:
        return one_line(error)
    return None
