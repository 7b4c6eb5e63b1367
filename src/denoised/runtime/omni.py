"""`Omni` and `AsyncOmni`: the engine in a program. Both drive the same client as the server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import queue
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import fields
from types import TracebackType
from typing import Any

from denoised.checks import unknown_names
from denoised.config import DiffusionParallelConfig, EngineConfig
from denoised.errors import InvalidRequestError
from denoised.lora_request import LoRARequest
from denoised.outputs import OmniRequestOutput, Preview, Progress, Saved
from denoised.request import OmniDiffusionSamplingParams, Prompt, Request, Service
from denoised.runtime import model_info
from denoised.runtime.accept import accept
from denoised.runtime.asking import Ask, in_order, one_each, rejected, shows_nothing
from denoised.runtime.client import Client
from denoised.runtime.kept import check_service
from denoised.runtime.stats import Stats

SamplingParams = OmniDiffusionSamplingParams
Heard = Progress | Preview | Saved | OmniRequestOutput
"""What is told of a request; its output is the last."""
_SERVICE = Service()


def engine_config(
    model: Any = None, parallel_config: DiffusionParallelConfig | None = None, **settings: Any
) -> EngineConfig:
    """An EngineConfig from the keywords of `Omni`.

    Raises:
        TypeError: an unknown keyword, with the nearest known one.
    """
    problem = unknown_names(settings, (f.name for f in fields(EngineConfig)), "keyword")
    if problem:
        raise TypeError(problem)
    given: dict[str, Any] = {"model": model, "parallel_config": parallel_config} | settings
    return EngineConfig(**{name: value for name, value in given.items() if value is not None})


class _Frontend:
    """What Omni and AsyncOmni share: the client, request ids, and checking a prompt into a request."""

    def __init__(
        self, model: Any = None, *, parallel_config: DiffusionParallelConfig | None = None, **settings: Any
    ) -> None:
        self.config = engine_config(model, parallel_config, **settings)
        self._client = Client(self.config)
        self._ids = itertools.count()
        # Dropped without close(): on whatever thread the garbage is collected, nobody waits there.
        finalizer = weakref.finalize(self, _close_aside, self._client)
        finalizer.atexit = False  # the client itself ends with the process

    @property
    def info(self) -> model_info.ModelInfo:
        """What the loaded model accepts."""
        return self._client.info

    @property
    def restarts(self) -> int:
        """How often ranks were lost and started again."""
        return self._client.restarts

    @property
    def rank_pids(self) -> list[int]:
        """Process ids of the ranks; empty where the one rank is a thread of this process."""
        return self._client.rank_pids

    def abort(self, request_id: str) -> None:
        """Stop a request wherever it stands; its output says so in `error`."""
        self._client.abort(request_id)

    def start_profile(self) -> None:
        """Trace what every rank does from here on."""
        self._client.start_profile()

    def stop_profile(self, folder: str = "profiles") -> list[str]:
        """Write a Chrome trace of each rank into `folder`, with the engine's stages named; the files."""
        return self._client.stop_profile(os.path.abspath(folder))

    @property
    def loras(self) -> list[str]:
        """Names of the adapters that were loaded."""
        return list(self._client.loras)

    def close(self) -> None:
        """Stop the engine; requests without an output fail."""
        self._client.close()

    def _next_id(self) -> str:
        return f"req-{next(self._ids)}"

    def stats(self) -> Stats:
        """Counters and gauges of this moment."""
        return self._client.stats()

    def _request(
        self, request_id: str, prompt: Any, params: SamplingParams | None, service: Service = _SERVICE
    ) -> Request:
        return accept(
            request_id, prompt, params or SamplingParams(), service, self.info, self.config, self._client.loras
        )

    def _resumed(self, request_id: str, checkpoint: Any, service: Service) -> Request:
        """The request that a checkpoint is of, as it stood when it was accepted."""
        from denoised.runtime import checkpoints

        check_service(service, self.info)
        return self._client.loras.complete(checkpoints.request_of(checkpoint, request_id, service))


def _close_aside(client: Client) -> None:
    threading.Thread(target=client.close, name="denoised-close", daemon=True).start()


class Omni(_Frontend):
    """Offline inference: a list of prompts in, a list of outputs out, in order.

    Args:
        model: hub id, folder in diffusers layout, built-in name (default: `shapes`), or a DiffusionPipeline.
        parallel_config: ranks and what they do.
        settings: any further field of `EngineConfig`.

    Raises:
        TypeError: an unknown keyword.
        InvalidConfigError, ModelError: settings or a model that cannot start, with the way out.
    """

    def __enter__(self) -> Omni:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        py_generator: bool = False,
        service: Service | Sequence[Service] = _SERVICE,
    ) -> Any:
        """Run requests; `list[OmniRequestOutput]` in the order of `prompts`.

        Args:
            prompts: a string, a dict, or a list of them.
            sampling_params: one for all, or one for each.
            use_tqdm: show a progress bar over denoising steps.
            py_generator: return a generator instead, which gives outputs as they finish, from its first `next` on.
            service: priority, timeout and the like: one for all, or one for each. However many wait, none is refused.

        A request that fails has its reason in `error`; the others are not touched.
        """
        many = [prompts] if isinstance(prompts, str | dict) else list(prompts)
        params = one_each(sampling_params, len(many))
        ids = [self._next_id() for _ in many]
        services = [service] * len(many) if isinstance(service, Service) else list(service)
        asks = [
            Ask(request_id=i, prompt=p, request=functools.partial(self._request, i, p, s, how))
            for i, p, s, how in zip(ids, many, params, services, strict=True)
        ]
        finished = self._run(asks, use_tqdm)
        return finished if py_generator else in_order(ids, finished)

    def load_lora(self, lora: LoRARequest) -> None:
        """Read an adapter, in place of one of its name, for requests that name it. Raises InvalidRequestError."""
        self._client.load_lora(lora)

    def unload_lora(self, name: str) -> None:
        """Forget it; what runs with it goes on. Raises InvalidRequestError."""
        self._client.unload_lora(name)

    def resume(
        self, checkpoints: Any, *, service: Service = _SERVICE, use_tqdm: bool = True
    ) -> list[OmniRequestOutput]:
        """Go on with requests from their checkpoints (`Saved.checkpoint`); the outputs, in order.

        What was computed before is not computed again, and the result is that of the undisturbed request. Of several
        that were begun, so go on with the one that was chosen.

        Args:
            checkpoints: one or a list, made with this model.
        """
        many = checkpoints if isinstance(checkpoints, list | tuple) else [checkpoints]
        ids = [self._next_id() for _ in many]
        asks = [
            Ask(request_id=i, prompt="", request=functools.partial(self._resumed, i, c, service))
            for i, c in zip(ids, many, strict=True)
        ]
        return in_order(ids, self._run(asks, use_tqdm))

    def _run(self, asks: Sequence[Ask], use_tqdm: bool) -> Iterator[OmniRequestOutput]:
        """Outputs as they finish. Leaving early (an exception, a closed generator) aborts what is still running."""
        from denoised.runtime.progress import StepBar

        inbox: queue.SimpleQueue[Heard] = queue.SimpleQueue()
        missing = dict.fromkeys(ask.request_id for ask in asks)
        with StepBar(len(asks), enabled=use_tqdm) as bar:
            try:
                for ask in asks:
                    try:
                        self._client.submit(shows_nothing(ask.request()), inbox.put)
                    except InvalidRequestError as error:
                        inbox.put(rejected(ask.request_id, ask.prompt, error))
                while missing:
                    event = inbox.get()
                    bar.show(event)
                    if isinstance(event, OmniRequestOutput):
                        del missing[event.request_id]
                        yield event
            finally:
                for request_id in missing:
                    self.abort(request_id)


class AsyncOmni(_Frontend):
    """Online inference in an event loop: `async for event in omni.generate(...)` gives `Progress`, `Preview` and
    `Saved` events and, last, the `OmniRequestOutput`. Cancelling the consumer aborts the request."""

    async def __aenter__(self) -> AsyncOmni:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        service: Service = _SERVICE,
    ) -> AsyncIterator[Heard]:
        """Run one request.

        Raises:
            InvalidRequestError: the model cannot run it; nothing was queued.
            QueueFullError: too much is waiting already; nothing was queued. `retry_after` says when to ask again.
        """
        request = self._request(request_id or self._next_id(), prompt, sampling_params, service)
        async with contextlib.aclosing(self._events(request)) as events:
            async for event in events:
                yield event

    async def resume(
        self, checkpoint: Any, *, request_id: str | None = None, service: Service = _SERVICE
    ) -> AsyncIterator[Heard]:
        """Go on with a request from its checkpoint (`Saved.checkpoint`), to the result of the undisturbed request.

        Raises:
            InvalidRequestError: it is no checkpoint; nothing was queued.
        """
        request = self._resumed(request_id or self._next_id(), checkpoint, service)
        async with contextlib.aclosing(self._events(request)) as events:
            async for event in events:
                yield event

    async def load_lora(self, lora: LoRARequest) -> None:
        """As `Omni.load_lora`."""
        await asyncio.to_thread(self._client.load_lora, lora)

    async def unload_lora(self, name: str) -> None:
        """As `Omni.unload_lora`."""
        await asyncio.to_thread(self._client.unload_lora, name)

    async def _events(self, request: Request) -> AsyncGenerator[Heard]:
        """Submit a request and hear of it until its end; leaving early aborts it."""
        events: asyncio.Queue[Heard] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def hear(event: Heard) -> None:
            with contextlib.suppress(RuntimeError):  # a loop that is closed has nobody left who listens
                loop.call_soon_threadsafe(events.put_nowait, event)

        self._client.submit(request, hear, bounded=True)
        done = False
        try:
            while not done:
                event = await events.get()
                done = isinstance(event, OmniRequestOutput)
                yield event
        finally:
            if not done:
                self.abort(request.request_id)
