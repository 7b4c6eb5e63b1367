"""One rank's engine: tasks in flight, advanced together, one tick at a time. The same on every rank.

    tick:  run encoder and VAE calls  ->  deal, join and run denoiser rows  ->  agree and exchange
           ->  resolve  ->  admit and cancel (rank 0's commands)  ->  advance every task until it blocks

Knows nothing of processes, queues or clients: commands come in by a callable, events go out as a list.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from typing import Any

from denoised.errors import RequestAbortedError, one_line
from denoised.features.guidance import Guidance, Outcome, Work
from denoised.request import OmniRequestOutput, Progress, Request
from denoised.runtime import finite, program
from denoised.runtime.encoder_cache import EncoderCache
from denoised.runtime.model_info import ModelInfo
from denoised.runtime.profile import RankProfiler, stage
from denoised.runtime.protocol import Command, Profiled
from denoised.runtime.results import CallError, InFlight, failed, output
from denoised.spec.model_spec import ModelSpec
from denoised.steps.forward import Call, Stage
from denoised.steps.tally import counted
from denoised.steps.task import Task
from denoised.steps.trap import StepObserver
from denoised.steps.wire import DesyncError, Header, Wire

# Seconds that a rank which failed waits for ranks that may be stuck in the forward it left, beyond thrice the longest.
COMPANY_PATIENCE = 5.0

EngineEvent = Progress | OmniRequestOutput | Profiled


class Engine:
    """Runs requests on one pipeline. `wire` is None where there is one rank.

    entangled: component calls hold collectives, so that a rank that fails in one may leave others waiting in it.
    """

    def __init__(
        self,
        *,
        pipeline: Any,
        spec: ModelSpec,
        info: ModelInfo,
        guidance: Guidance,
        cache: EncoderCache,
        wire: Wire | None,
        axes: dict[str, int],
        entangled: bool = False,
    ) -> None:
        self._pipeline, self._spec, self._info, self._axes = pipeline, spec, info, axes
        self._guidance, self._cache, self._wire = guidance, cache, wire
        self._in_flight: dict[str, InFlight] = {}
        self._ended: list[InFlight] = []
        self._arities: dict[str, Any] = {}
        self._events: list[EngineEvent] = []
        self._profiler = RankProfiler()
        self._entangled, self._longest = entangled, 0.0
        self.stopped = False

    @property
    def idle(self) -> bool:
        return not self._in_flight and not self._ended

    def tick(self, commands: Callable[[], list[Command]]) -> list[EngineEvent]:
        """One round for every request in flight. `commands` is asked once, on rank 0."""
        calls = [call for flight in self._in_flight.values() for call in flight.task.pending]
        atomic = [call for call in calls if call.target.stage is not Stage.DENOISE]
        denoise = [call for call in calls if call.target.stage is Stage.DENOISE]
        began = time.perf_counter()
        values, errors = self._run_atomic(atomic)
        started = time.perf_counter()
        with stage("denoise"):
            outcome = self._guidance.run(denoise)
        self._longest = max(self._longest, time.perf_counter() - began)
        with stage("agree"):
            orders = self._agree(calls, errors, outcome, commands)
        self._finish()
        with stage("exchange"):
            values |= self._guidance.finish(denoise, outcome, self._wire)
        self._charge(denoise, time.perf_counter() - started)
        self._resolve(calls, values, errors, outcome)
        with stage("advance"):
            self._advance([f for f in self._in_flight.values() if calls and f.task.pending])
        for order in orders:
            self._obey(order)
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
                    values[call] = self._encoded(call, flight)
                self._guidance.work_of(call.task_id).counts.update(counts)
            except Exception as error:
                errors[position] = one_line(error)
            flight.seconds[call.target.stage] += time.perf_counter() - started
        return values, errors

    def _encoded(self, call: Call, flight: InFlight) -> Any:
        key = self._cache.key(call)
        value = self._cache.get(key)
        if value is not None:
            flight.cache_hits += 1
            return value
        if call.target.stage is Stage.DECODE:
            finite.check(call)
        value = flight.task.run_atomic(call)
        flight.cache_misses += key is not None
        self._cache.put(key, value)
        return value

    def _charge(self, calls: list[Call], seconds: float) -> None:
        for task_id in {call.task_id for call in calls}:
            self._in_flight[task_id].seconds[Stage.DENOISE] += seconds

    def _agree(
        self, calls: list[Call], errors: dict[int, str], outcome: Outcome, commands: Callable[[], list[Command]]
    ) -> list[Command]:
        """Errors of any rank become errors of all; rank 0's commands become everyone's."""
        if self._wire is None:
            return commands()
        for key, problem in self._wire.prepare(outcome.outputs).items():
            outcome.errors[key] = problem
        orders = commands() if self._wire.rank == 0 else []
        plan = ([_name(c) for c in calls], [(r, p.key) for r, p in outcome.pieces], [_end(f) for f in self._ended])
        digest = zlib.crc32(repr(plan).encode())
        header = self._header(digest, [*errors.values(), *outcome.errors.values()], commands=bool(orders))
        if header.errors:
            for other_errors, other_pieces in self._wire.gather_objects((errors, outcome.errors)):
                errors.update(other_errors)
                outcome.errors.update(other_pieces)
        if header.news:
            self._wire.learn_layouts()
        return self._wire.from_first(orders) if header.commands else []

    def _header(self, digest: int, problems: list[str], *, commands: bool) -> Header:
        assert self._wire is not None
        patience = COMPANY_PATIENCE + 3 * self._longest if problems and self._entangled else None
        try:
            return self._wire.header(digest=digest, errors=bool(problems), commands=commands, patience=patience)
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
                flight.reported = flight.step
                progress = Progress(request_id=flight.task.task_id, step=flight.step, total_steps=flight.total_steps)
                self._events.append(progress)
        for flight in flights:
            if flight.task.done:
                self._ended.append(self._in_flight.pop(flight.task.task_id))

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
        observer = StepObserver() if request.params.return_trajectory_latents else None
        flight = InFlight(request=request, task=None, observer=observer, started=time.perf_counter())  # type: ignore[arg-type]
        try:
            call = program.build(self._pipeline, request, self._info, report=flight.report, observer=observer)
        except Exception as error:
            self._events.append(failed(request, error))
            return
        flight.task = Task(request.request_id, call, seed=request.seed, arities=self._arities, defer=self._spec.defer)
        self._in_flight[request.request_id] = flight
        self._advance([flight])

    def _cancel(self, request_id: str) -> None:
        flight = self._in_flight.pop(request_id, None)
        if flight is not None:
            flight.task.cancel()
            self._release(request_id)
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
            self._events.append(self._result(flight, [ranks[position] for ranks in everyone]))

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
