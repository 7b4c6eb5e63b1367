"""The client's thread: what it does with requests that come in and with what ranks say.

Every method runs on that one thread, so that nothing here needs a lock; `runtime/client.py` has what callers see.
"""

from __future__ import annotations

import logging
import math
import queue
import shutil
import threading
import time
from collections.abc import Callable

from denoised.config import EngineConfig
from denoised.errors import EngineError, InvalidRequestError, one_line
from denoised.outputs import OmniRequestOutput, Preview, Progress, Saved
from denoised.request import Request
from denoised.runtime import calibrations, ship
from denoised.runtime.desk import Desk
from denoised.runtime.failures import refused
from denoised.runtime.kept import Kept
from denoised.runtime.lora_orders import Orders
from denoised.runtime.pending import Listener, Pending, Stop, too_late, took
from denoised.runtime.protocol import Command, Event, Failed, LoraDone, Profiled, Ticked
from denoised.runtime.replicas import Answers, Replicas
from denoised.runtime.scheduler import Scheduler

_log = logging.getLogger(__name__)

RankSays = tuple[int, int, int, Event | None]
"""Replica, generation of its ranks, rank, and what it says; None: it is gone."""
# Seconds between looks at deadlines, places and signs of life, while there are requests; after so many without a look
# this process itself was away, and the silence of ranks says nothing.
LOOK, AWAY = 0.5, 10.0


class Clerk:
    """Requests without an output, the replicas that run them, and the thread that brings both together."""

    def __init__(self, config: EngineConfig) -> None:
        config, self._promise = calibrations.within(config)
        self._config, self._scratch = ship.for_ranks(config)
        self._inbox: queue.SimpleQueue[RankSays | Callable[[], None]] = queue.SimpleQueue()
        self._replicas = Replicas(self._config, lambda *said: self._inbox.put(said))
        # Where rank 0's program is ahead of this one, which has yet to ask.
        self._unclaimed: dict[str, OmniRequestOutput] = {}
        self._unclaimed_traces: list[list[str]] = []
        self._asks_nothing = False
        self._over = threading.Event()
        self._pending: dict[str, Pending] = {}
        self._kept = Kept()
        self._broken: str | None = None
        self._traces: Answers | None = None
        self._lora_orders = Orders()
        self.restarts = 0
        try:
            self.info = self._replicas.start()
        except BaseException:
            self._replicas.stop()
            self._shut()
            raise
        max_num_seqs = 1 if self.info.exclusive else config.max_num_seqs
        room = self.info.footprint.room if self.info.footprint is not None else math.inf
        self._scheduler = Scheduler(max_num_seqs, len(self._replicas.crews), room=room)
        self._desk = Desk(self._scheduler, config, self.info, size=max_num_seqs)
        self._next_look, self._looked = math.inf, 0.0
        self._thread = threading.Thread(target=self._loop, name="denoised-client", daemon=True)

    def _loop(self) -> None:
        while True:
            item: RankSays | Callable[[], None] | None = None
            try:
                item = self._next_item()
                if time.monotonic() >= self._next_look:
                    self._look(quiet=item is None)
                if item is None:
                    continue
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

    def _next_item(self) -> RankSays | Callable[[], None] | None:
        """What comes in next; None: it is time to look around."""
        wait = self._next_look - time.monotonic()
        try:
            return self._inbox.get(timeout=None if wait == math.inf else max(0.0, wait))
        except queue.Empty:
            return None

    def _look(self, *, quiet: bool) -> None:
        """Deadlines, places in the queue, and ranks that say nothing any more; `quiet`: all they said was heard."""
        now = time.monotonic()
        if now - self._looked > AWAY:
            self._desk.forgive(now)
        self._looked = now
        for request_id in self._scheduler.expired(now):
            self._end_early(request_id, too_late(self._pending[request_id].request), now)
        for event in self._desk.places(now):
            self._tell(self._pending[event.request_id], event)
        writing = self._traces is not None and self._traces.missing  # which may take long
        for replica, silence in self._desk.hung(now) if quiet and not writing else ():
            self._hung(replica, silence)
        then = time.monotonic()
        self._desk.took(then - now)
        self._next_look = min(then + LOOK, self._scheduler.next_deadline()) if self._pending else math.inf

    def _submit(self, request: Request, listener: Listener, came: float) -> None:
        entry, problem = Pending(request=request, listener=listener), self._broken
        if problem is not None:
            self._desk.intake.leave(request.request_id)
            entry.tell(refused(request, EngineError(problem)))
            return
        if request.request_id in self._pending:
            problem = f"request_id={request.request_id!r} is in use; give each request its own."
            entry.tell(refused(request, InvalidRequestError(problem)))
            return
        self._pending[request.request_id] = entry
        self._desk.came(request, came)
        self._next_look = min(self._next_look, time.monotonic())
        if (early := self._unclaimed.pop(request.request_id, None)) is not None:
            self._end(request.request_id, early)
        self._admit()

    def _admit(self) -> None:
        for request_id in self._scheduler.admit():
            request = self._kept.resumed(self._pending[request_id].request)
            self._desk.started(request_id, time.monotonic())
            try:
                self._send_to_its_replica(request_id, Command(admit=request))
            except Exception as error:
                problem = f"the request cannot be sent to the ranks ({one_line(error)}); give plain values."
                self._end(request_id, refused(request, InvalidRequestError(problem)))

    def _send_to_its_replica(self, request_id: str, command: Command) -> None:
        replica = self._scheduler.replica_of(request_id)
        assert replica is not None, "only what runs has a replica"
        self._replicas.crews[replica].send(command)

    def _end_early(self, request_id: str, stop: Stop, since: float) -> None:
        entry = self._pending.get(request_id)
        if self._replicas.follows or entry is None or entry.stop is not None:
            return  # of several under torchrun, the program that leads stops it, and tells
        entry.stop = stop
        self._desk.stopped(request_id, since)
        if request_id in self._scheduler.running:
            self._scheduler.stopping(request_id)
            self._send_to_its_replica(request_id, Command(cancel=request_id))
        else:
            self._end(request_id, refused(entry.request, stop))

    def _handle(self, replica: int, rank: int, event: Event | None) -> None:
        self._desk.heard(replica, time.monotonic())
        if event is None:
            self._crashed(replica, f"rank {rank} died")
        elif isinstance(event, Failed):
            self._crashed(replica, f"rank {rank}: {event.error}")
        elif isinstance(event, OmniRequestOutput):
            self._end(event.request_id, event, replica)
        elif isinstance(event, Progress) and event.request_id in self._pending:
            event = self._desk.progress(event, time.monotonic())
            self._tell(self._pending[event.request_id], event)
        elif isinstance(event, Ticked):
            self._desk.ticked(replica, event)
        elif isinstance(event, Preview | Saved) and event.request_id in self._pending:
            if isinstance(event, Saved):
                self._kept.keep(event)
            self._tell(self._pending[event.request_id], event)
        elif isinstance(event, Profiled) and self._traces is not None and self._traces.missing:
            self._traces.add(replica, event.paths)
        elif isinstance(event, LoraDone):
            self._lora_orders.heard(replica, event, keeps=self._may_be_late)
        elif isinstance(event, Profiled) and self._may_be_late:
            self._unclaimed_traces.append(event.paths)

    def _end(self, request_id: str, output: OmniRequestOutput, replica: int = 0) -> None:
        entry = self._pending.pop(request_id, None)
        self._kept.drop(request_id)
        self._scheduler.remove(request_id, took(output))
        if entry is not None:
            output = entry.finished(output, None if self._replicas.follows else replica, self._promise)
            self._desk.ended(output, time.monotonic())
            self._tell(entry, output)
        elif self._may_be_late:
            self._unclaimed[request_id] = output
        self._admit()

    def _crashed(self, replica: int, reason: str) -> None:
        """A replica's ranks are gone: start them again and run its requests anew. The other replicas go on."""
        self.restarts += 1
        self._desk.restarted(replica, time.monotonic())
        again, given_up = self._scheduler.crashed(replica)
        self._scheduler.pause(replica)
        if self._traces is not None:
            self._traces.add(replica, [])
        self._lora_orders.gone(replica)
        for request_id in again:
            self._pending[request_id].restarts += 1
        for request_id in given_up:
            self._fail(request_id, EngineError(f"the engine crashed each time this request ran ({reason})."))
        for request_id in again:
            if (stop := self._pending[request_id].stop) is not None:
                self._fail(request_id, stop)
        if self._replicas.torchrun is not None:
            self._replicas.crews[replica].retire()
            self._restarted(replica, EngineError(f"{reason}; torchrun restarts ranks, not this process."))
            return
        self._replicas.restart(replica, lambda *end: self._inbox.put(lambda: self._restarted(*end)))

    def _hung(self, replica: int, silence: float) -> None:
        """Ranks that say nothing for so long are ended, and others take their place."""
        reason = f"its ranks said nothing for {silence:.0f} s"
        if self._replicas.torchrun is None and not self._replicas.crews[replica].pids:
            self._fail_all(f"the engine hangs: {reason}; its rank is a thread of this process, so start it anew.")
        elif self._replicas.torchrun is None:
            _log.error("replica %d hangs: %s; they are started anew", replica, reason)
            self._crashed(replica, reason)

    def _restarted(self, replica: int, problem: Exception | None) -> None:
        if problem is None:
            self._replicas.crews[replica].attend()
            self._scheduler.resume(replica)
            self._desk.heard(replica, time.monotonic())
        elif not self._scheduler.abandon(replica):
            self._fail_all(f"the engine cannot run any more: {problem}")
            return
        else:
            _log.error("replica %d cannot run any more, the others go on: %s", replica, problem)
        self._admit()

    def _fail(self, request_id: str, reason: Exception) -> None:
        self._scheduler.remove(request_id)
        self._kept.drop(request_id)
        entry = self._pending.pop(request_id)
        output = refused(entry.request, reason)
        self._desk.ended(output, time.monotonic())
        self._tell(entry, output)

    def _tell(self, entry: Pending, event: Progress | Preview | Saved | OmniRequestOutput) -> None:
        entry.tell(event)
        self._replicas.echo(event)

    @property
    def _may_be_late(self) -> bool:
        """Rank 0's program may be ahead: what it was answered is kept until this one asks."""
        return self._replicas.torchrun is not None and not self._asks_nothing

    def _ask_nothing(self) -> None:
        self._asks_nothing = True
        self._unclaimed.clear()

    def _fail_all(self, reason: str) -> None:
        self._broken = reason
        self._over.set()
        for request_id in list(self._pending):
            self._fail(request_id, EngineError(reason))
        for replica in range(len(self._replicas.crews)):
            self._lora_orders.gone(replica)
        if self._traces is not None:
            for replica in self._traces.missing:
                self._traces.add(replica, [])

    def _stop(self) -> None:
        self._replicas.stop()
        self._fail_all("the engine was closed before this request was done.")

    def _shut(self) -> None:
        self._replicas.join()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
