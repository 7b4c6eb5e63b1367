"""Prometheus text for /metrics: the engine's own numbers, read when asked for, and what HTTP callers met.

A registry of its own, so that two servers in one process do not meet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

from denoised.runtime.stats import ReplicaStats, Spread, Stats, Work

disable_created_metrics()  # type: ignore[no-untyped-call]  # when a series began is of no use, and doubles the text
_MIB = 2**20
# Seconds: pictures take one, videos many.
_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_GAUGES = {
    "queued": "requests that wait",
    "running": "requests in flight",
    "queued_seconds": "predicted work of what waits",
}
_SPREADS = {
    "time_to_free": "seconds from an abort or a deadline until the ranks were free of the request",
    "admission_wait": "seconds from submission until a replica took the request",
    "request_seconds": "seconds from submission to output, of requests that ended well",
    "eta_error": "how far off the predicted time was, relative to the real one",
}
_WORK = {
    "ticks": "ticks that had work",
    "tick_seconds": "seconds of those ticks",
    "steps": "denoising steps of all requests",
    "rows": "denoiser rows",
    "rows_joined": "rows that shared a forward with another request's",
    "waits": "ticks in which a request in flight waited for its turn",
    "encoder_cache_hits": "prompts and images that were encoded before",
    "encoder_cache_misses": "prompts and images that were not",
}


class HttpMetrics:
    """Requests as callers met them. `registry` holds everything that /metrics shows."""

    def __init__(self, stats: Callable[[], Stats | None]) -> None:
        self.registry = CollectorRegistry()
        names = ("method", "route", "status")
        self._requests = Counter("denoised_http_requests", "answers", names, registry=self.registry)
        self._seconds = Histogram(
            "denoised_http_seconds", "until the answer's end", ("route",), buckets=_BUCKETS, registry=self.registry
        )
        self._open = Gauge("denoised_http_in_progress", "requests without an end yet", registry=self.registry)
        self.registry.register(EngineCollector(stats))

    @contextlib.contextmanager
    def in_progress(self) -> Iterator[None]:
        with self._open.track_inprogress():
            yield

    def done(self, method: str, route: str, status: int, seconds: float) -> None:
        known = method if method in ("GET", "POST", "DELETE") else "other"
        self._requests.labels(known, route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """`Stats` as metrics. None, while there is no engine, gives none."""

    def __init__(self, stats: Callable[[], Stats | None]) -> None:
        self._stats = stats

    def describe(self) -> Iterable[Metric]:
        return ()  # or registering would ask an engine that is not there

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        if stats is not None:
            yield from _of_engine(stats)
            yield from _of_replicas(stats.replicas)


def _of_engine(stats: Stats) -> Iterator[Metric]:
    for name, help in _GAUGES.items():
        yield GaugeMetricFamily(f"denoised_{name}", help, value=getattr(stats, name))
    yield GaugeMetricFamily("denoised_ready", "1 if every replica's ranks are there", value=float(stats.ready))
    yield CounterMetricFamily("denoised_submitted", "requests that were queued", value=stats.submitted_total)
    yield CounterMetricFamily("denoised_completed", "requests that ended well", value=stats.completed_total)
    errors = CounterMetricFamily("denoised_errors", "requests that did not", labels=["kind"])
    for kind, count in stats.errors_total.items():
        errors.add_metric([kind], count)
    yield errors
    for name, help in _SPREADS.items():
        yield from _spread(name, help, getattr(stats, name))


def _spread(name: str, help: str, spread: Spread) -> Iterator[Metric]:
    name = name if name.endswith("seconds") or name == "eta_error" else f"{name}_seconds"
    yield SummaryMetricFamily(f"denoised_{name}", help, count_value=spread.count, sum_value=spread.total)
    yield GaugeMetricFamily(f"denoised_{name}_largest", f"the largest: {help}", value=spread.largest)


def _of_replicas(replicas: tuple[ReplicaStats, ...]) -> Iterator[Metric]:
    def gauge(name: str, help: str, value: Callable[[ReplicaStats], float]) -> Metric:
        family = GaugeMetricFamily(f"denoised_replica_{name}", help, labels=["replica"])
        for replica in replicas:
            family.add_metric([str(replica.replica)], value(replica))
        return family

    yield gauge("ready", "1 if its ranks are there", lambda r: float(r.ready))
    yield gauge("running", "requests in flight there", lambda r: r.running)
    yield gauge("seconds_left", "predicted work of what runs there", lambda r: r.seconds_left)
    yield gauge("longest_tick_seconds", "the longest tick so far", lambda r: r.work.longest_tick)
    yield gauge("memory_bytes", "what rank 0 holds", lambda r: r.memory_mb * _MIB)
    yield gauge("loras", "LoRA adapters in memory", lambda r: r.loras)
    yield gauge("lora_bytes", "LoRA adapters in memory, whole", lambda r: r.lora_mb * _MIB)
    yield _counter("restarts", "times its ranks were lost", replicas, lambda r: r.restarts_total)
    for name, help in _WORK.items():
        yield _counter(name, help, replicas, lambda r, name=name: getattr(r.work, f"{name}_total"))  # type: ignore[misc]
    yield _labelled("stage_seconds", "stage", replicas, lambda work: work.stage_seconds_total)
    yield _labelled(
        "rank_busy_seconds", "rank", replicas, lambda work: {str(i): s for i, s in enumerate(work.busy_seconds_total)}
    )


def _counter(
    name: str, help: str, replicas: tuple[ReplicaStats, ...], value: Callable[[ReplicaStats], float]
) -> Metric:
    family = CounterMetricFamily(f"denoised_{name}", help, labels=["replica"])
    for replica in replicas:
        family.add_metric([str(replica.replica)], value(replica))
    return family


def _labelled(
    name: str, label: str, replicas: tuple[ReplicaStats, ...], values: Callable[[Work], dict[str, float]]
) -> Metric:
    family = CounterMetricFamily(f"denoised_{name}", f"seconds by {label}", labels=["replica", label])
    for replica in replicas:
        for key, seconds in values(replica.work).items():
            family.add_metric([str(replica.replica), key], seconds)
    return family
