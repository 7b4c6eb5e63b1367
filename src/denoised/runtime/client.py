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
from denoised.errors import EngineError, QueueFullError, RequestAbortedError
from denoised.request import Request
from denoised.rules import validate
from denoised.runtime.clerk import Clerk
from denoised.runtime.failures import refused
from denoised.runtime.pending import Listener
from denoised.runtime.protocol import Command, Profiled
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


def _num_devices(config: EngineConfig) -> int | None:
    """Accelerators here, or None on a CPU machine and where ranks are not started here."""
    elsewhere = config.distributed_executor_backend == "ray" or torchrun_rank() is not None
    if config.parallel_config.world_size == 1 or elsewhere:
        return None
    from denoised.env import num_accelerators

    return num_accelerators()
