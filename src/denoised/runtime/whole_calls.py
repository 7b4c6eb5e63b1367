"""Encoder and VAE calls: run whole, on every rank, or taken from the encoder cache or a preview's memory."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
from denoised.steps.forward import Call, Stage
from denoised.steps.tally import counted


class WholeCalls:
    """Runs them one after another."""

    def __init__(self, cache: EncoderCache, guidance: Guidance, meter: RankMeter, info: ModelInfo) -> None:
        self._cache, self._guidance, self._meter, self._info = cache, guidance, meter, info

    def run(self, calls: list[Call], in_flight: Mapping[str, InFlight]) -> tuple[dict[Call, Any], dict[int, str]]:
        """Values by call. Errors by position, which is equal on all ranks."""
        values, errors = {}, {}
        for position, call in enumerate(calls):
            flight = in_flight[call.task_id]
            started = time.perf_counter()
            try:
                name = f"{call.target.stage}: {call.target.name}.{call.target.method}"
                with stage(name), counted() as counts, HighWater() as high:
                    values[call] = self._recalled(call, flight)
                self._guidance.work_of(call.task_id).counts.update(counts)
                flight.rose_to(call.target.stage, high.mb)
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
