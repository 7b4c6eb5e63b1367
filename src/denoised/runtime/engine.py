"""One rank's engine: tasks in flight, advanced together, one tick at a time. The same on every rank.

    tick:  of the requests whose turn it is: run an encoder or VAE call, or deal, join and run denoiser rows
           ->  agree and exchange  ->  resolve  ->  advance their tasks until they block
           ->  admit and cancel (rank 0's commands)  ->  choose whose turn is next (runtime/turns.py)

Knows nothing of processes, queues or clients: commands come in by a callable, events go out as a list.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from denoised.errors import InvalidRequestError, RequestAbortedError
from denoised.features.guidance import Guidance, Outcome, Work
from denoised.lora_request import Lora
from denoised.outputs import OmniRequestOutput, Preview, Progress, Saved
from denoised.request import Request
from denoised.runtime import previews
from denoised.runtime.agreement import Agreement
from denoised.runtime.dispatch import Dispatch
from denoised.runtime.encoder_cache import EncoderCache
from denoised.runtime.flights import Runway
from denoised.runtime.memory import HighWater
from denoised.runtime.meter import RankMeter
from denoised.runtime.model_info import ModelInfo
from denoised.runtime.profile import RankProfiler, stage
from denoised.runtime.protocol import Command, LoraDone, Profiled, Ticked
from denoised.runtime.results import CallError, InFlight, failed, output
from denoised.runtime.whole_calls import Whole, WholeCalls
from denoised.steps.forward import Call, Stage
from denoised.steps.wire import Wire

EngineEvent = Progress | Preview | Saved | OmniRequestOutput | Profiled | LoraDone | Ticked


class Engine:
    """Runs requests on one pipeline. `wire` is None where there is one rank.

    advised: a failed request's output with what to change.
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
        advised: Callable[[OmniRequestOutput, Request], OmniRequestOutput] = lambda output, request: output,
    ) -> None:
        self._runway, self._info, self._axes = runway, info, axes
        self._guidance, self._wire = guidance, wire
        self._agreement = Agreement(wire, entangled=entangled)
        self._dispatch, self._advised = dispatch, advised
        self._meter = RankMeter(dispatch, wire.size if wire is not None else 1)
        place = wire.place if wire is not None else 0
        self._whole_calls = WholeCalls(cache, guidance, self._meter, info, dispatch.travels, place)
        self._afterwards = 0.0  # seconds that the last tick worked on after its exchange
        self._in_flight: dict[str, InFlight] = {}
        self._ended: list[InFlight] = []
        self._events: list[EngineEvent] = []
        self._profiler = RankProfiler()
        self.stopped = False

    @property
    def idle(self) -> bool:
        return not self._in_flight and not self._ended

    def tick(self, commands: Callable[[bool], list[Command]]) -> list[EngineEvent]:
        """One round for the requests whose turn it is. `commands`, on rank 0: what came in; True: wait for some."""
        chosen = [f for f in self._in_flight.values() if f.task.task_id in self._dispatch.turn.request_ids]
        calls = [call for flight in chosen for call in flight.task.pending]
        atomic = [call for call in calls if call.target.stage is not Stage.DENOISE]
        denoise = [call for call in calls if call.target.stage is Stage.DENOISE]
        began = time.perf_counter()
        if calls:
            self._meter.begins()
        whole = self._whole_calls.run(atomic, self._in_flight, dict(self._dispatch.turn.places))
        started = time.perf_counter()
        with stage("denoise"), HighWater() as high:
            outcome = self._guidance.run(denoise, self._dispatch.prices(calls).__getitem__, self._dispatch.taken())
        ran = time.perf_counter() - began if calls else 0.0
        worked = ran + self._afterwards
        with stage("agree"):
            asked = functools.partial(commands, self.idle)
            agreed = self._agreement.reach(calls, self._ended, whole, outcome, asked, ran=ran, worked=worked)
        self._finish()
        with stage("exchange"):
            values = self._exchange(denoise, whole, outcome)
        exchanged = time.perf_counter()
        self._charge(denoise, exchanged - started, high.mb)
        self._resolve(calls, values, whole.errors, outcome)
        with stage("advance"):
            self._advance(chosen)
        self._dispatch.ran(calls, outcome.pieces, agreed.ran)
        # A rank that is alone asks once more: what came in the meantime need not wait for the next tick.
        for order in [*agreed.orders, *(commands(False) if self._wire is None else ())]:
            self._obey(order)
        self._drop_orphans()
        self._dispatch.choose(self._in_flight.values())
        self._afterwards = time.perf_counter() - exchanged if calls else 0.0
        if calls:
            self._meter.tick(time.perf_counter() - began, ran=agreed.ran, worked=agreed.worked)
        self._meter.loras = self._runway.adapters.num_loaded
        self._meter.lora_mb = self._runway.adapters.num_bytes / 2**20
        # First how it goes: who then hears that something is done finds it in the counters.
        events, self._events = [*self._meter.word(idle=self.idle), *self._events], []
        return events

    # ---- running

    def _exchange(self, denoise: list[Call], whole: Whole, outcome: Outcome) -> dict[Call, Any]:
        """The values of all calls that did not fail, on every rank."""
        outputs = {**whole.outputs, **outcome.outputs}
        if self._wire is not None:
            parcels = [*whole.parcels(), *self._guidance.parcels(outcome)]
            sent = {parcel.key for parcel in parcels}
            outputs = self._wire.exchange(parcels, {key: value for key, value in outputs.items() if key in sent})
        settled = self._whole_calls.settle(whole, outputs, self._in_flight)
        return settled | self._guidance.finish(denoise, outcome, outputs)

    def _charge(self, calls: list[Call], seconds: float, peak_mb: float) -> None:
        for task_id in {call.task_id for call in calls}:
            self._in_flight[task_id].seconds[Stage.DENOISE] += seconds
            self._in_flight[task_id].rose_to(Stage.DENOISE, peak_mb)
        self._meter.stage(Stage.DENOISE, seconds if calls else 0.0)

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
        elif order.load_lora is not None:
            self._change_loras(self._runway.adapters.load, order.load_lora)
        elif order.unload_lora is not None:
            self._change_loras(self._runway.adapters.unload, order.unload_lora)

    def _change_loras(self, change: Callable[[Lora], None], lora: Lora) -> None:
        self._meter.noted()
        try:
            change(lora)
            self._events.append(LoraDone())
        except InvalidRequestError as error:
            self._events.append(LoraDone(problem=str(error)))

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
        flight.queued_ticks = self._meter.ticks_since(request.came)
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
        did = self._guidance.release(request_id)
        did.loras = self._runway.adapters.acted(request_id, denoised=did.forwards > 0)
        self._runway.adapters.release(request_id)
        return did

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
            self._show(flight, flight.parent, did[self._wire.rank if self._wire is not None else 0])
        elif flight.needs_its_start:
            self._take_off(self._runway.again(flight))
        else:
            self._events.append(self._result(flight, did))

    def _show(self, flight: InFlight, parent: InFlight, did: Work) -> None:
        """A preview has ended: what it took is part of its request."""
        if self._is_in_flight(parent):
            shown = previews.result(flight, self._info)
            self._events += [shown] if shown is not None else []
            self._guidance.work_of(parent.task.task_id).counts.update(did.counts + Counter(previews=1))
            parent.seconds[Stage.DECODE] += flight.seconds[Stage.DECODE]

    def _result(self, flight: InFlight, work: list[Work]) -> OmniRequestOutput:
        if flight.task.error is not None:
            return self._advised(failed(flight.request, flight.task.error), flight.request)
        try:
            return output(flight, work, self._info, self._axes)
        except Exception as error:
            return failed(flight.request, error)
