"""The client of the ranks: takes requests, hands them to rank 0 of a replica as the scheduler says, gives events back,
and starts a replica again when a rank of it dies. Ranks are disposable; requests are not: they live here until they
have an output.

A request gives the same result whenever it is run, because its seed is fixed before it is queued.
"""

from __future__ import annotations

import atexit
import dataclasses
import queue
import threading
import time

from denoised.config import EngineConfig
from denoised.errors import (
    EngineError,
    InvalidConfigError,
    InvalidRequestError,
    QueueFullError,
    RequestAbortedError,
)
from denoised.lora_request import Lora, LoRARequest
from denoised.request import Request
from denoised.rules import validate
from denoised.runtime.adapters import Names, locate, resolve
from denoised.runtime.clerk import Clerk
from denoised.runtime.failures import refused
from denoised.runtime.lora_orders import Ask, verdict
from denoised.runtime.pending import Listener
from denoised.runtime.protocol import Command, LoraDone, Profiled
from denoised.runtime.replicas import Answers
from denoised.runtime.stats import Stats
from denoised.runtime.torchrun import torchrun_rank

# Seconds that writing traces may take, and that a snapshot may.
PROFILE_PATIENCE, STATS_PATIENCE = 300.0, 10.0


class Client(Clerk):
    """Runs one engine. Thread-safe; listeners are called on the client's own thread and must not block."""

    def __init__(self, config: EngineConfig) -> None:
        validate(config, num_devices=_num_devices(config))
        self._door, self._closed = threading.Lock(), False
        self.loras = Names()
        _check_lora(config)
        super().__init__(config)
        self._thread.start()
        # Before the interpreter takes its threads away in the middle of a forward.
        atexit.register(self.close)

    def submit(self, request: Request, listener: Listener, *, bounded: bool = False) -> None:
        """Queue a request; `listener` gets its progress and, last, its output.

        Raises:
            QueueFullError: `bounded`, and too much is waiting already; nothing was queued.
        """
        request = dataclasses.replace(request, came=time.time())
        with self._door:  # nothing enters behind `_stop`
            if not self._closed:
                # Programs under torchrun must stay alike, and each would count for itself.
                self._enter(request, bounded and self._replicas.torchrun is None)
                came = time.monotonic()
                self._inbox.put(lambda: self._submit(request, listener, came))
                return
        listener(refused(request, EngineError("the engine is closed.")))

    def follow(self) -> None:
        """Under torchrun, beside rank 0: compute what its program asks, keep no output, return when it ends."""
        assert torchrun_rank(), "only what is not rank 0 of torchrun has somebody to follow"
        self._inbox.put(self._ask_nothing)
        self._over.wait()

    def _enter(self, request: Request, bounded: bool) -> None:
        try:
            self._desk.intake.enter(request.request_id, self._desk.predict(request), bounded=bounded)
        except QueueFullError:
            self._inbox.put(lambda: self._desk.refused("queue_full"))
            raise

    def abort(self, request_id: str) -> None:
        """Stop a request wherever it stands; its output then says that it was aborted."""
        since = time.monotonic()
        self._inbox.put(lambda: self._end_early(request_id, RequestAbortedError("aborted"), since))

    def stats(self) -> Stats:
        """Counters and gauges of this moment."""
        answer: queue.SimpleQueue[Stats] = queue.SimpleQueue()
        with self._door:
            ask = not self._closed and threading.current_thread() is not self._thread
            if ask:
                self._inbox.put(lambda: answer.put(self._stats()))
        return answer.get(timeout=STATS_PATIENCE) if ask else self._stats()

    def _stats(self) -> Stats:
        return self._desk.stats([] if self._broken else self._scheduler.open_replicas)

    def load_lora(self, lora: LoRARequest) -> None:
        """Have an adapter in every replica's memory, known by its name from here on.

        Raises:
            InvalidRequestError: it cannot be read, or does not fit the model.
            EngineError: no ranks are there.
        """
        found = resolve(lora)
        self._order(Command(load_lora=found))
        self.loras.add(dataclasses.replace(lora, lora_path=found.path))

    def unload_lora(self, name: str) -> None:
        """Forget a name; memory is free when the requests that use it have ended. Raises as `load_lora`."""
        known = self.loras.remove(name)
        found = Lora(name=name, path=known.lora_path, stamp=(0, 0), component=known.component)
        self._order(Command(unload_lora=found))

    def _order(self, command: Command) -> None:
        ask = Ask()

        def done(problems: list[str]) -> None:
            ask.done(problems)
            self._replicas.echo(LoraDone(problem=verdict(problems)))

        def make() -> None:
            replicas = [] if self._broken else list(self._scheduler.open_replicas)
            self._lora_orders.make(done, replicas)
            for replica in replicas:
                self._replicas.crews[replica].send(command)

        with self._door:
            if self._closed:
                raise EngineError("the engine is closed.")
            self._inbox.put(make)
        ask.wait()

    def start_profile(self) -> None:
        """Every rank starts a trace."""
        self._inbox.put(lambda: self._replicas.send(Command(start_profile=True)))

    def stop_profile(self, folder: str) -> list[str]:
        """Every rank writes its trace into `folder`, in one of its replica if there are several; the files, when all
        are written."""
        answer: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

        def done(paths: list[str]) -> None:
            answer.put(paths)
            self._replicas.echo(Profiled(paths=paths))

        def ask() -> None:
            if self._unclaimed_traces:
                answer.put(self._unclaimed_traces.pop(0))
                return
            crews = [] if self._broken else self._replicas.crews
            self._traces = Answers(self._scheduler.open_replicas if crews else [], done)
            for replica in self._traces.missing:
                place = folder if len(crews) == 1 else f"{folder}/replica-{replica}"
                crews[replica].send(Command(stop_profile=place))

        self._inbox.put(ask)
        return answer.get(timeout=PROFILE_PATIENCE)

    @property
    def rank_pids(self) -> list[int]:
        """Process ids of the ranks; empty where the one rank is a thread of this process."""
        return [pid for pids in self.replica_pids for pid in pids]

    @property
    def replica_pids(self) -> list[list[int]]:
        """The same, by replica; none of a replica that is just being started."""
        return [crew.pids for crew in self._replicas.crews]

    def close(self) -> None:
        """Stop the ranks; requests without an output fail."""
        with self._door:
            if self._closed:
                return
            self._closed = True
            self._inbox.put(self._stop)
        atexit.unregister(self.close)
        # A listener may close the engine: that thread must not wait for itself.
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=60)
            if self._thread.is_alive():
                self._shut()


def _check_lora(config: EngineConfig) -> None:
    """A start-up adapter that is not there, before ranks are started. Raises InvalidConfigError."""
    if config.lora_path is not None and config.distributed_executor_backend != "ray":
        try:
            locate(config.lora_path)
        except InvalidRequestError as error:
            raise InvalidConfigError(str(error)) from error


def _num_devices(config: EngineConfig) -> int | None:
    """Accelerators here, or None on a CPU machine and where ranks are not started here."""
    elsewhere = config.distributed_executor_backend == "ray" or torchrun_rank() is not None
    if config.parallel_config.world_size == 1 or elsewhere:
        return None
    from denoised.env import num_accelerators

    return num_accelerators()
