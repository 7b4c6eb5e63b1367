"""Encoder and VAE calls: run whole, by one rank for all or by every rank, or taken from the encoder cache or a
preview's memory."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from denoised.errors import one_line
from denoised.features.guidance import Guidance
from denoised.runtime import finite, previews
from denoised.runtime.encoder_cache import EncoderCache
from denoised.runtime.memory import HighWater
from denoised.runtime.meter import RankMeter
from denoised.runtime.model_info import ModelInfo
from denoised.runtime.profile import stage
from denoised.runtime.results import InFlight
from denoised.runtime.travels import Travels
from denoised.steps.forward import Call, Stage
from denoised.steps.tally import count, counted
from denoised.steps.wire import Key, Parcel


@dataclass(kw_only=True)
class Whole:
    """The encoder and VAE calls of one tick. Errors by position, which is equal on all ranks.

    began: by the clock. outputs: what this rank ran for all, under the names of `parcels`.
    away: the rank of each call that one ran, by position. same: those that another call of this tick answers.
    contents: of calls that were not in the encoder cache, by position. everywhere: those that every rank ran.
    """

    calls: Sequence[Call]
    began: float = field(default_factory=time.perf_counter)
    values: dict[Call, Any] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    outputs: dict[Key, Any] = field(default_factory=dict)
    away: dict[int, int] = field(default_factory=dict)
    same: dict[int, int] = field(default_factory=dict)
    contents: dict[int, str] = field(default_factory=dict)
    everywhere: set[int] = field(default_factory=set)

    def key(self, position: int) -> Key:
        """The same on every rank; the last part is the position."""
        return (self.calls[position].task_id, "whole", position)

    def parcels(self) -> list[Parcel]:
        """What has to travel."""
        return [Parcel(rank=rank, key=self.key(at)) for at, rank in self.away.items() if at not in self.errors]


class WholeCalls:
    """Runs them one after another. `rank`: of the cfg axis."""

    def __init__(
        self, cache: EncoderCache, guidance: Guidance, meter: RankMeter, info: ModelInfo, travels: Travels, rank: int
    ) -> None:
        self._cache, self._guidance, self._meter, self._info = cache, guidance, meter, info
        self._travels, self._rank = travels, rank

    def run(self, calls: Sequence[Call], in_flight: Mapping[str, InFlight], places: Mapping[str, int]) -> Whole:
        """This rank's part. places: the rank of each request whose call one rank runs; the others run everywhere."""
        whole = Whole(calls=calls)
        for position, call in enumerate(calls):
            flight, started = in_flight[call.task_id], time.perf_counter()
            try:
                name = f"{call.target.stage}: {call.target.name}.{call.target.method}"
                with stage(name), counted() as counts, HighWater() as high:
                    self._begin(whole, position, flight, places.get(call.task_id))
                self._guidance.work_of(call.task_id).counts.update(counts)
                self._guidance.work_of(call.task_id).rose_to(call.target.stage, high.mb)
            except Exception as error:
                whole.errors[position] = one_line(error)
            if position not in whole.away:
                self._charge(call, flight, time.perf_counter() - started)
        return whole

    def settle(self, whole: Whole, outputs: Mapping[Key, Any], in_flight: Mapping[str, InFlight]) -> dict[Call, Any]:
        """All values, once `outputs` has those of every rank. What is remembered of a call is remembered here, when
        all ranks know that it failed on none."""
        for position in whole.away:
            call = whole.calls[position]
            self._charge(call, in_flight[call.task_id], time.perf_counter() - whole.began)
            if position not in whole.errors:
                whole.values[call] = outputs[whole.key(position)]
        for position, other in whole.same.items():
            if other in whole.errors:
                whole.errors[position] = whole.errors[other]
            else:
                whole.values[whole.calls[position]] = copy.deepcopy(whole.values[whole.calls[other]])
        for position, call in enumerate(whole.calls):
            if position not in whole.errors:
                self._remember(whole, position, in_flight[call.task_id])
        return whole.values

    def _begin(self, whole: Whole, position: int, flight: InFlight, place: int | None) -> None:
        call = whole.calls[position]
        value = previews.recall(call, flight, self._info)
        if value is None:
            value = self._cached(whole, position, flight)
        if value is not None:
            whole.values[call] = value
        elif place is None:
            whole.everywhere.add(position)
            whole.values[call] = self._run(call, flight)
        elif position not in whole.same:
            whole.away[position] = place
            if place == self._rank:
                whole.outputs[whole.key(position)] = self._run(call, flight)

    def _cached(self, whole: Whole, position: int, flight: InFlight) -> Any | None:
        """What the encoder cache has; if it will have it at the end of this tick, that is noted."""
        key = self._cache.key(whole.calls[position])
        if key is None:
            return None
        value = self._cache.get(key)
        if value is None and key in whole.contents.values():
            whole.same[position] = next(at for at, other in whole.contents.items() if other == key)
        elif value is None:
            whole.contents[position] = key
        hit = value is not None or position in whole.same
        flight.cache_hits, flight.cache_misses = flight.cache_hits + hit, flight.cache_misses + (not hit)
        self._meter.counts[f"encoder_cache_{'hits' if hit else 'misses'}_total"] += 1
        return value

    @staticmethod
    def _run(call: Call, flight: InFlight) -> Any:
        count("component_calls")
        if call.target.stage is Stage.DECODE:
            finite.check(call)
        return flight.task.run_atomic(call)

    def _remember(self, whole: Whole, position: int, flight: InFlight) -> None:
        call = whole.calls[position]
        value = whole.values[call]
        if position in whole.everywhere:
            self._travels.learn(call, value)
        if position not in whole.same:
            self._cache.put(whole.contents.get(position), value)
        if flight.memory is not None:
            flight.memory.keep(call, value)

    def _charge(self, call: Call, flight: InFlight, seconds: float) -> None:
        flight.seconds[call.target.stage] += seconds
        self._meter.stage(call.target.stage, seconds)
