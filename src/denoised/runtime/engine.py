"""One rank's engine: tasks in flight, advanced together, one tick at a time. The same on every rank.

    tick:  of the requests whose turn it is: run an encoder or VAE call, or deal, join and run denoiser rows
           ->  agree and exchange  ->  resolve  ->  advance their tasks until they block
           ->  admit and cancel (rank 0's commands)  ->  choose whose turn is next (runtime/turns.py)

Knows nothing of processes, queues or clients: commands come in by a callable, events go out as a list.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import Any

from denoised.errors import RequestAbortedError, one_line
from denoised.features.guidance import Guidance, Outcome, Work
from denoised.request import OmniRequestOutput, Preview, Progress, Request, Saved
from denoised.runtime import finite, previews
from denoised.runtime.dispatch import Dispatch
from denoised.runtime.encoder_cache import EncoderCache
from denoised.runtime.flights import Runway
from denoised.runtime.meter import RankMeter
from denoised.runtime.model_info import ModelInfo
from denoised.runtime.profile import RankProfiler, stage
from denoised.runtime.protocol import Command, Profiled, Ticked
from denoised.runtime.results import CallError, InFlight, failed, output
from denoised.steps.forward import Call, Stage
from denoised.steps.tally import counted
from denoised.steps.wire import DesyncError, Header, Wire

# Seconds that a rank which failed waits for ranks that may be stuck in the forward it left, beyond thrice the longest.
COMPANY_PATIENCE = 5.0

EngineEvent = Progress | Preview | Saved | OmniRequestOutput | Profiled | Ticked


class Engine:
    """Runs requests on one pipeline. `wire` is None where there is one rank.

    entangled: component calls hold collectives, so that a rank that fails in one may leave others waiting in it.
    """

    def __init__(
        self,
        *,
        runway: Runway,
        info: ModelInfo,
        guidance: Guidance,
        cache: EncoderCache,
        wire: Wire | None,
        axes: dict[str, int],
        dispatch: Dispatch,
        entangled: bool = False,
    ) -> None:
        self._runway, self._info, self._axes = runway, info, axes
        self._guidance, self._cache, self._wire = guidance, cache, wire
        self._dispatch = dispatch
        self._meter = RankMeter(dispatch, wire.size if wire is not None else 1)
        self._in_flight: dict[str, InFlight] = {}
        self._ended: list[InFlight] = []
        self._events: list[EngineEvent] = []
        self._profiler = RankProfiler()
        self._entangled, self._longest = entangled, 0.0
        self.stopped = False

    @property
    def idle(self) -> bool:
        return not self._in_flight and not self._ended

    def tick(self, commands: Callable[[], list[Command]]) -> list[EngineEvent]:
        """One round for the requests whose turn it is. `commands` is asked once, on rank 0."""
        chosen = [f for f in self._in_flight.values() if f.task.task_id in self._dispatch.turn.request_ids]
        calls = [call for flight in chosen for call in flight.task.pending]
        atomic = [call for call in calls if call.target.stage is not Stage.DENOISE]
        denoise = [call for call in calls if call.target.stage is Stage.DENOISE]
        began = time.perf_counter()
        values, errors = self._run_atomic(atomic)
        started = time.perf_counter()
        with stage("denoise"):
            outcome = self._guidance.run(denoise)
        busy = time.perf_counter() - began if calls else 0.0
        self._longest = max(self._longest, busy)
        with stage("agree"):
            orders, everyone_busy = self._agree(calls, errors, outcome, commands, busy)
        self._finish()
        with stage("exchange"):
            values |= self._guidance.finish(denoise, outcome, self._wire)
        self._charge(denoise, time.perf_counter() - started)
        self._resolve(calls, values, errors, outcome)
        with stage("advance"):
            self._advance(chosen)
        self._dispatch.ran(calls, outcome.pieces, everyone_busy)
        for order in orders:
            self._obey(order)
        self._drop_orphans()
        self._dispatch.choose(self._in_flight.values())
        if calls:
            self._meter.tick(time.perf_counter() - began, everyone_busy)
        self._events += self._meter.word(idle=self.idle)
        events, self._events = self._events, []
        return events

    # ---- running

    def _run_atomic(self, calls: list[Call]) -> tuple[dict[Call, Any], dict[int, str]]:
        """Encoder and VAE calls: whole, on every rank. Errors by position, which is equal on all ranks."""
        values, errors = {}, {}
        for position, call in enumerate(calls):
            flight = self._in_flight[call.task_id]
            started = time.perf_counter()
            try:
                with stage(f"{call.target.stage}: {call.target.name}.{call.target.method}"), counted() as counts:
                    values[call] = self._recalled(call, flight)
                self._guidance.work_of(call.task_id).counts.update(counts)
            except Exception as error:
                errors[position] = one_line(error)
            seconds = time.perf_counter() - started
            flight.seconds[call.target.stage] += seconds
            self._meter.stage(call.target.stage, seconds)
        return values, errors

    def _recalled(self, call: Call, flight: InFlight) -> Any:
        value = previews.recall(call, flight, self._info)
        if value is None:
            value = self._encoded(call, flight)
        if flight.memory is not None:
            flight.memory.keep(call, value)
        return value

    def _encoded(self, call: Call, flight: InFlight) -> Any:
        key = self._cache.key(call)
        value = self._cache.get(key)
        if value is not None:
            flight.cache_hits += 1
            self._meter.counts["encoder_cache_hits_total"] += 1
            return value
        if call.target.stage is Stage.DECODE:
            finite.check(call)
        value = flight.task.run_atomic(call)
        flight.cache_misses += key is not None
        self._meter.counts["encoder_cache_misses_total"] += key is not None
        self._cache.put(key, value)
        return value

    def _charge(self, calls: list[Call], seconds: float) -> None:
        for task_id in {call.task_id for call in calls}:
            self._in_flight[task_id].seconds[Stage.DENOISE] += seconds
        self._meter.stage(Stage.DENOISE, seconds if calls else 0.0)

    def _agree(
        self,
        calls: list[Call],
        errors: dict[int, str],
        outcome: Outcome,
        commands: Callable[[], list[Command]],
        busy: float,
    ) -> tuple[list[Command], tuple[float, ...]]:
        """Errors of any rank become errors of all; rank 0's commands, everyone's. Also how busy each rank was."""
        if self._wire is None:
            return commands(), (busy,)
        for key, problem in self._wire.prepare(outcome.outputs).items():
            outcome.errors[key] = problem
        orders = commands() if self._wire.rank == 0 else []
        plan = ([_name(c) for c in calls], [(r, p.key) for r, p in outcome.pieces], [_end(f) for f in self._ended])
        digest = zlib.crc32(repr(plan).encode())
        header = self._header(digest, [*errors.values(), *outcome.errors.values()], commands=bool(orders), busy=busy)
        if header.errors:
            for other_errors, other_pieces in self._wire.gather_objects((errors, outcome.errors)):
                errors.update(other_errors)
                outcome.errors.update(other_pieces)
        if header.news:
            self._wire.learn_layouts()
        return self._wire.from_first(orders) if header.commands else [], header.busy

    def _header(self, digest: int, problems: list[str], *, commands: bool, busy: float) -> Header:
        assert self._wire is not None
        patience = COMPANY_PATIENCE + 3 * self._longest if problems and self._entangled else None
        try:
            return self._wire.header(
                digest=digest, errors=bool(problems), commands=commands, busy=busy, patience=patience
            )
        except DesyncError as error:
            raise DesyncError(f"{error}: {problems[0]}" if problems else str(error)) from error

    def _resolve(self, calls: list[Call], values: dict[Call, Any], errors: dict[int, str], outcome: Outcome) -> None:
        atomic = [call for call in calls if call.target.stage is not Stage.DENOISE]
        for position, call in enumerate(atomic):
            if position in errors:
                call.source.fail(CallError(f"{call.target.name}: {errors[position]}"))
        for rank, piece in outcome.pieces:
            if piece.key in outcome.errors:
                piece.call.source.fail(
                    CallError(f"{piece.call.target.name} on rank {rank}: {outcome.errors[piece.key]}")
                )
        for call in calls:
            if not call.source.done:
                self._in_flight[call.task_id].task.learn(call, values[call])
                call.source.resolve(values[call])

    def _advance(self, flights: list[InFlight]) -> None:
        for flight in flights:
            flight.task.pending.clear()
            flight.task.advance()
            if flight.step != flight.reported:
                self._meter.counts["steps_total"] += max(0, flight.step - flight.reported)
                flight.reported = flight.step
                progress = Progress(request_id=flight.task.task_id, step=flight.step, total_steps=flight.total_steps)
                self._events.append(progress)
            self._look(flight)
        for flight in flights:
            if flight.task.done:
                self._ended.append(self._in_flight.pop(flight.task.task_id))
                self._dispatch.leave(flight.task.task_id)

    def _look(self, flight: InFlight) -> None:
        """What a request gives out between two iterations: a checkpoint, a preview that takes off."""
        saved, preview = self._runway.between(flight)
        if saved is not None:
            self._events.append(saved)
        if preview is not None:
            self._take_off(preview)

    def _drop_orphans(self) -> None:
        """Previews of requests that are over."""
        for task_id, flight in list(self._in_flight.items()):
            if flight.parent is not None and not self._is_in_flight(flight.parent):
                del self._in_flight[task_id]
                flight.task.cancel()
                self._dispatch.leave(task_id)
                self._release(task_id)

    def _is_in_flight(self, flight: InFlight) -> bool:
        return self._in_flight.get(flight.task.task_id) is flight

    # ---- commands

    def _obey(self, order: Command) -> None:
        if order.stop:
            self.stopped = True
            for request_id in list(self._in_flight):
                self._cancel(request_id)
        elif order.cancel is not None:
            self._cancel(order.cancel)
        elif order.admit is not None:
            self._admit(order.admit)
        elif order.start_profile:
            self._profiler.start()
        elif order.stop_profile is not None:
            self._write_profile(order.stop_profile)

    def _write_profile(self, folder: str) -> None:
        path = self._profiler.stop(folder, self._wire.rank if self._wire is not None else 0)
        paths = self._wire.gather_objects(path) if self._wire is not None else [path]
        self._events.append(Profiled(paths=[p for p in paths if p is not None]))

    def _admit(self, request: Request) -> None:
        try:
            flight = self._runway.request(request)
        except Exception as error:
            self._events.append(failed(request, error))
            return
        self._take_off(flight)

    def _take_off(self, flight: InFlight) -> None:
        self._in_flight[flight.task.task_id] = flight
        self._dispatch.enter(flight.task.task_id, flight.request.service)
        self._advance([flight])

    def _cancel(self, request_id: str) -> None:
        flight = self._in_flight.pop(request_id, None)
        if flight is not None:
            flight.task.cancel()
            self._dispatch.leave(request_id)
            self._meter.rows([self._release(request_id)])
            self._events.append(failed(flight.request, RequestAbortedError("aborted")))

    def _release(self, request_id: str) -> Work:
        if self._wire is not None:
            self._wire.forget(request_id)
        return self._guidance.release(request_id)

    # ---- results

    def _finish(self) -> None:
        """Outputs of the requests that ended in the last tick, now that all ranks agree that they did."""
        if not self._ended:
            return
        ended, self._ended = self._ended, []
        work = [self._release(flight.task.task_id) for flight in ended]
        everyone = self._wire.gather_objects(work) if self._wire is not None else [work]
        for position, flight in enumerate(ended):
            did = [ranks[position] for ranks in everyone]
            self._meter.rows(did)
            self._land(flight, did)

    def _land(self, flight: InFlight, did: list[Work]) -> None:
        if flight.parent is not None:
            shown = previews.result(flight, self._info) if self._is_in_flight(flight.parent) else None
            self._events += [shown] if shown is not None else []
        elif flight.needs_its_start:
            self._take_off(self._runway.again(flight))
        else:
            self._events.append(self._result(flight, did))

    def _result(self, flight: InFlight, work: list[Work]) -> OmniRequestOutput:
        if flight.task.error is not None:
            return failed(flight.request, flight.task.error)
        try:
            return output(flight, work, self._info, self._axes)
        except Exception as error:
            return failed(flight.request, error)


def _name(call: Call) -> tuple[str, str, str, int]:
    return (call.task_id, call.target.name, call.target.method, call.branch)


def _end(flight: InFlight) -> tuple[str, bool]:
    return (flight.task.task_id, flight.task.error is None)
