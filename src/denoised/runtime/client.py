"""The client of the ranks: takes requests, hands them to rank 0 of a replica as the scheduler says, gives events back,
and starts a replica again when a rank of it dies. Ranks are disposable; requests are not: they live here until they
have an output.

A request gives the same result whenever it is run, because its seed is fixed before it is queued.
"""

from __future__ import annotations

import atexit
import dataclasses
import logging
import queue
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from denoised.config import EngineConfig, validate
from denoised.errors import RequestAbortedError, one_line
from denoised.request import OmniRequestOutput, Progress, Request
from denoised.runtime import cost, launch, load
from denoised.runtime.protocol import Command, Event, Failed, Profiled
from denoised.runtime.replicas import Answers, Replicas
from denoised.runtime.scheduler import Scheduler

_log = logging.getLogger(__name__)

Listener = Callable[[Progress | OmniRequestOutput], None]
RankSays = tuple[int, int, int, Event | None]
"""Replica, generation of its ranks, rank, and what it says; None: it is gone."""
# Seconds that writing traces may take.
PROFILE_PATIENCE = 300.0


@dataclasses.dataclass(kw_only=True)
class Pending:
    """A request without an output yet."""

    request: Request
    listener: Listener
    restarts: int = 0
    aborted: bool = False

    def tell(self, event: Progress | OmniRequestOutput) -> None:
        """A listener that raises harms nobody but itself."""
        try:
            self.listener(event)
        except Exception:
            _log.exception("the listener of request %s raised", self.request.request_id)


class Client:
    """Runs one engine. Thread-safe; listeners are called on the client's own thread and must not block."""

    def __init__(self, config: EngineConfig) -> None:
        validate(config, num_devices=_num_devices(config))
        self._scratch: str | None = None
        self._config = self._transportable(config)
        self._inbox: queue.SimpleQueue[RankSays | Callable[[], None]] = queue.SimpleQueue()
        self._replicas = Replicas(self._config, lambda *said: self._inbox.put(said))
        self._unclaimed: dict[str, OmniRequestOutput] = {}
        self._door = threading.Lock()
        self._pending: dict[str, Pending] = {}
        self._broken: str | None = None
        self._traces: Answers | None = None
        self._closed = False
        self.restarts = 0
        try:
            self.info = self._replicas.start()
        except BaseException:
            self._replicas.stop()
            self._shut()
            raise
        max_num_seqs = 1 if self.info.exclusive else config.max_num_seqs
        self._scheduler = Scheduler(max_num_seqs, len(self._replicas.crews))
        self._thread = threading.Thread(target=self._loop, name="denoised-client", daemon=True)
        self._thread.start()
        # Before the interpreter takes its threads away in the middle of a forward.
        atexit.register(self.close)

    # ---- for callers, on any thread

    def submit(self, request: Request, listener: Listener) -> None:
        """Queue a request; `listener` gets its progress and, last, its output."""
        with self._door:  # nothing enters behind `_stop`
            if not self._closed:
                self._inbox.put(lambda: self._submit(request, listener))
                return
        listener(_error(request, "the engine is closed."))

    def abort(self, request_id: str) -> None:
        """Stop a request wherever it stands; its output then says that it was aborted."""
        self._inbox.put(lambda: self._abort(request_id))

    def start_profile(self) -> None:
        """Every rank starts a trace."""
        self._inbox.put(lambda: self._replicas.send(Command(start_profile=True)))

    def stop_profile(self, folder: str) -> list[str]:
        """Every rank writes its trace into `folder`, in one of its replica if there are several; the files, when all
        are written."""
        answer: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

        def ask() -> None:
            crews = [] if self._broken else self._replicas.crews
            self._traces = Answers(self._scheduler.open_replicas if crews else [], answer.put)
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

    # ---- on the client's thread

    def _loop(self) -> None:
        while True:
            item = self._inbox.get()
            try:
                if callable(item):
                    item()
                elif item[1] == self._replicas.crews[item[0]].generation:
                    self._handle(item[0], item[2], item[3])
            except Exception as error:  # whatever it is, nobody must wait for ever
                _log.exception("the client failed")
                self._fail_all(f"the engine cannot run any more: {one_line(error)}")
            if item == self._stop:
                self._shut()
                return

    def _submit(self, request: Request, listener: Listener) -> None:
        if self._broken:
            Pending(request=request, listener=listener).tell(_error(request, self._broken))
            return
        if request.request_id in self._pending:
            problem = f"request_id={request.request_id!r} is in use; give each request its own."
            Pending(request=request, listener=listener).tell(_error(request, problem))
            return
        self._pending[request.request_id] = Pending(request=request, listener=listener)
        self._scheduler.add(request.request_id, cost.predict(request, self.info))
        if (early := self._unclaimed.pop(request.request_id, None)) is not None:
            self._end(request.request_id, early)
        self._admit()

    def _admit(self) -> None:
        for request_id in self._scheduler.admit():
            request = self._pending[request_id].request
            try:
                self._send_to_its_replica(request_id, Command(admit=request))
            except Exception as error:
                problem = f"the request cannot be sent to the ranks ({one_line(error)}); give plain values."
                self._end(request_id, _error(request, problem))

    def _send_to_its_replica(self, request_id: str, command: Command) -> None:
        replica = self._scheduler.replica_of(request_id)
        assert replica is not None, "only what runs has a replica"
        self._replicas.crews[replica].send(command)

    def _abort(self, request_id: str) -> None:
        if request_id in self._scheduler.running:
            self._pending[request_id].aborted = True
            self._send_to_its_replica(request_id, Command(cancel=request_id))
        elif request_id in self._pending:
            self._end(request_id, _error(self._pending[request_id].request, str(RequestAbortedError("aborted"))))

    def _handle(self, replica: int, rank: int, event: Event | None) -> None:
        if event is None:
            self._crashed(replica, f"rank {rank} died")
        elif isinstance(event, Failed):
            self._crashed(replica, f"rank {rank}: {event.error}")
        elif isinstance(event, OmniRequestOutput):
            self._end(event.request_id, event, replica)
        elif isinstance(event, Progress) and event.request_id in self._pending:
            self._scheduler.progress(event.request_id, event.step, event.total_steps)
            self._pending[event.request_id].tell(event)
        elif isinstance(event, Profiled) and self._traces is not None:
            self._traces.add(replica, event.paths)

    def _end(self, request_id: str, output: OmniRequestOutput, replica: int = 0) -> None:
        entry = self._pending.pop(request_id, None)
        self._scheduler.remove(request_id)
        if entry is not None:
            if output.receipt is not None:
                receipt = dataclasses.replace(output.receipt, replica=replica, restarts=entry.restarts)
                output = dataclasses.replace(output, receipt=receipt)
            entry.tell(output)
        elif self._replicas.torchrun:  # rank 0's program is ahead of this one, which has yet to ask
            self._unclaimed[request_id] = output
        self._admit()

    def _crashed(self, replica: int, reason: str) -> None:
        """A replica's ranks are gone: start them again and run its requests anew. The other replicas go on."""
        self.restarts += 1
        again, given_up = self._scheduler.crashed(replica)
        self._scheduler.pause(replica)
        if self._traces is not None:
            self._traces.add(replica, [])
        for request_id in again:
            self._pending[request_id].restarts += 1
        for request_id in given_up:
            self._fail(request_id, f"the engine crashed each time this request ran ({reason}).")
        for request_id in [i for i in again if self._pending[i].aborted]:
            self._fail(request_id, str(RequestAbortedError("aborted")))
        if self._replicas.torchrun is not None:
            self._fail_all(f"the engine cannot run any more: {reason}; torchrun restarts ranks, not this process.")
            return
        self._replicas.restart(replica, lambda *end: self._inbox.put(lambda: self._restarted(*end)))

    def _restarted(self, replica: int, problem: Exception | None) -> None:
        if problem is None:
            self._replicas.crews[replica].attend()
            self._scheduler.resume(replica)
        elif not self._scheduler.abandon(replica):
            self._fail_all(f"the engine cannot run any more: {problem}")
            return
        else:
            _log.error("replica %d cannot run any more, the others go on: %s", replica, problem)
        self._admit()

    def _fail(self, request_id: str, reason: str) -> None:
        self._scheduler.remove(request_id)
        entry = self._pending.pop(request_id)
        entry.tell(_error(entry.request, reason))

    def _fail_all(self, reason: str) -> None:
        self._broken = reason
        for request_id in list(self._pending):
            self._fail(request_id, reason)
        if self._traces is not None:
            for replica in self._traces.missing:
                self._traces.add(replica, [])

    def _stop(self) -> None:
        self._replicas.stop()
        self._fail_all("the engine was closed before this request was done.")

    # ---- the model and the end

    def _transportable(self, config: EngineConfig) -> EngineConfig:
        """A pipeline object reaches ranks in other processes as a folder."""
        if isinstance(config.model, str | Path):
            load.locate(str(config.model))  # a damaged folder is told before any rank starts
            return config
        if config.parallel_config.world_size == 1 or launch.torchrun_rank() is not None:
            return config
        self._scratch = tempfile.mkdtemp(prefix="denoised-model-")
        config.model.save_pretrained(self._scratch)
        return dataclasses.replace(config, model=self._scratch)

    def _shut(self) -> None:
        self._replicas.join()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)


def _error(request: Request, reason: str) -> OmniRequestOutput:
    return OmniRequestOutput(request_id=request.request_id, prompt=request.prompt, error=reason)


def _num_devices(config: EngineConfig) -> int | None:
    """Accelerators here, or None on a CPU machine. One rank needs no check, and no import of torch for it."""
    if config.parallel_config.world_size == 1 or launch.torchrun_rank() is not None:
        return None
    from denoised.env import num_accelerators

    return num_accelerators()
