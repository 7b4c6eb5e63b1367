"""The client of the ranks: takes requests, hands them to rank 0 as the scheduler says, gives events back, and starts
the ranks again when one dies. Ranks are disposable; requests are not: they live here until they have an output.

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
from denoised.errors import EngineError, RequestAbortedError, one_line
from denoised.request import OmniRequestOutput, Progress, Request
from denoised.runtime import launch, load
from denoised.runtime.crew import Crew, Mailbox
from denoised.runtime.protocol import Command, Event, Failed, Profiled
from denoised.runtime.scheduler import Scheduler

_log = logging.getLogger(__name__)

Listener = Callable[[Progress | OmniRequestOutput], None]
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
        self._inbox = Mailbox()
        self._crew = Crew(self._config, self._inbox, lambda: self._closed)
        self._unclaimed: dict[str, OmniRequestOutput] = {}
        self._door = threading.Lock()
        self._pending: dict[str, Pending] = {}
        self._broken: str | None = None
        self._profile_listener: Callable[[list[str]], None] | None = None
        self._closed = False
        self.restarts = 0
        try:
            self.info = self._crew.start()
        except BaseException:
            self._shut()
            raise
        self._scheduler = Scheduler(1 if self.info.exclusive else config.max_num_seqs)
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
        self._inbox.put(lambda: self._crew.send(Command(start_profile=True)))

    def stop_profile(self, folder: str) -> list[str]:
        """Every rank writes its trace into `folder`; the files, when all are written."""
        answer: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

        def ask() -> None:
            if self._broken:
                answer.put([])
            self._profile_listener = answer.put
            self._crew.send(Command(stop_profile=folder))

        self._inbox.put(ask)
        return answer.get(timeout=PROFILE_PATIENCE)

    @property
    def rank_pids(self) -> list[int]:
        """Process ids of the ranks; empty where the one rank is a thread of this process."""
        return self._crew.pids

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
                elif item[0] == self._crew.generation:
                    self._handle(item[1], item[2])
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
        self._scheduler.add(request.request_id)
        if (early := self._unclaimed.pop(request.request_id, None)) is not None:
            self._end(request.request_id, early)
        self._admit()

    def _admit(self) -> None:
        for request_id in self._scheduler.admit():
            request = self._pending[request_id].request
            try:
                self._crew.send(Command(admit=request))
            except Exception as error:
                problem = f"the request cannot be sent to the ranks ({one_line(error)}); give plain values."
                self._end(request_id, _error(request, problem))

    def _abort(self, request_id: str) -> None:
        if request_id in self._scheduler.running:
            self._pending[request_id].aborted = True
            self._crew.send(Command(cancel=request_id))
        elif request_id in self._pending:
            self._end(request_id, _error(self._pending[request_id].request, str(RequestAbortedError("aborted"))))

    def _handle(self, rank: int, event: Event | None) -> None:
        if event is None:
            self._restart(f"rank {rank} died")
        elif isinstance(event, Failed):
            self._restart(f"rank {rank}: {event.error}")
        elif isinstance(event, OmniRequestOutput):
            self._end(event.request_id, event)
        elif isinstance(event, Progress) and event.request_id in self._pending:
            self._pending[event.request_id].tell(event)
        elif isinstance(event, Profiled) and self._profile_listener is not None:
            self._profile_listener(event.paths)

    def _end(self, request_id: str, output: OmniRequestOutput) -> None:
        entry = self._pending.pop(request_id, None)
        self._scheduler.remove(request_id)
        if entry is not None:
            if output.receipt is not None and entry.restarts:
                receipt = dataclasses.replace(output.receipt, restarts=entry.restarts)
                output = dataclasses.replace(output, receipt=receipt)
            entry.tell(output)
        elif self._crew.torchrun:  # rank 0's program is ahead of this one, which has yet to ask
            self._unclaimed[request_id] = output
        self._admit()

    def _restart(self, reason: str) -> None:
        """Ranks are gone: start them again and run the requests that were in flight anew."""
        again, given_up = self._scheduler.crashed()
        for request_id in again:
            self._pending[request_id].restarts += 1
        for request_id in given_up:
            entry = self._pending.pop(request_id)
            entry.tell(_error(entry.request, f"the engine crashed each time this request ran ({reason})."))
        for request_id in [i for i in again if self._pending[i].aborted]:
            self._scheduler.remove(request_id)
            entry = self._pending.pop(request_id)
            entry.tell(_error(entry.request, str(RequestAbortedError("aborted"))))
        self.restarts += 1
        try:
            if self._crew.torchrun is not None:
                raise EngineError(f"{reason}; torchrun restarts ranks, not this process.")
            self._crew.start()
        except Exception as error:
            self._fail_all(f"the engine cannot run any more: {error}")
            return
        self._admit()

    def _fail_all(self, reason: str) -> None:
        self._broken = reason
        entries, self._pending = list(self._pending.values()), {}
        for entry in entries:
            self._scheduler.remove(entry.request.request_id)
            entry.tell(_error(entry.request, reason))
        if self._profile_listener is not None:
            self._profile_listener([])

    def _stop(self) -> None:
        self._crew.stop()
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
        self._crew.join()
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
