"""Numbers of a running engine, for `/metrics` and for people: a snapshot, as plain data.

Names that end in `_total` only grow, also when ranks start again; `seconds` are seconds, `mb` are 2**20 bytes. Who
measures what is `runtime/meter.py`'s business; nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What was measured of one quantity: how often, the sum, the largest, the latest."""

    count: int = 0
    total: float = 0.0
    largest: float = 0.0
    latest: float = 0.0

    def plus(self, value: float) -> Spread:
        return Spread(count=self.count + 1, total=self.total + value, largest=max(self.largest, value), latest=value)

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one replica's ranks did since they were first started.

    busy_seconds: by rank, that it worked (encoders, denoiser forwards, VAEs, programs) and did not wait for another.
    tick_seconds: of all ticks that had work; longest_tick: of one of them.
    steps: denoising steps of all requests. rows_joined: those that shared a forward with another request's.
    stage_seconds: encode, denoise, decode, on rank 0. waits: ticks in which a request in flight had to wait its turn.
    """

    ticks_total: int = 0
    tick_seconds_total: float = 0.0
    longest_tick: float = 0.0
    steps_total: int = 0
    rows_total: int = 0
    rows_joined_total: int = 0
    waits_total: int = 0
    encoder_cache_hits_total: int = 0
    encoder_cache_misses_total: int = 0
    stage_seconds_total: dict[str, float] = field(default_factory=dict)
    busy_seconds_total: tuple[float, ...] = ()

    def plus(self, other: Work) -> Work:
        """The sum: what earlier ranks did, and what those in their place did."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in _ADDED}
        stages = dict.fromkeys([*self.stage_seconds_total, *other.stage_seconds_total])
        count = max(len(self.busy_seconds_total), len(other.busy_seconds_total))
        return Work(
            **sums,
            longest_tick=max(self.longest_tick, other.longest_tick),
            stage_seconds_total={
                name: self.stage_seconds_total.get(name, 0.0) + other.stage_seconds_total.get(name, 0.0)
                for name in stages
            },
            busy_seconds_total=tuple(
                _at(self.busy_seconds_total, rank) + _at(other.busy_seconds_total, rank) for rank in range(count)
            ),
        )


_APART = ("stage_seconds_total", "busy_seconds_total", "longest_tick")
_ADDED = tuple(name for name in Work.__dataclass_fields__ if name not in _APART)


def _at(values: tuple[float, ...], place: int) -> float:
    return values[place] if place < len(values) else 0.0


@dataclass(frozen=True, kw_only=True)
class ReplicaStats:
    """One replica. `ready`: its ranks are there. seconds_left: predicted, of what runs there. memory_mb: what rank 0
    holds now, on its device if it has one. loras, lora_mb: adapters in memory, whole."""

    replica: int
    ready: bool
    running: int
    seconds_left: float
    restarts_total: int
    memory_mb: float = 0.0
    loras: int = 0
    lora_mb: float = 0.0
    work: Work = Work()


@dataclass(frozen=True, kw_only=True)
class Stats:
    """A snapshot of an engine: gauges, and counters since its start.

    queued_seconds: predicted work of what is queued. time_to_free: seconds from a request's abort, or its deadline,
    until the ranks are free of it. admission_wait: seconds from submission to a replica. request_seconds: from
    submission to output, of those that ended well. errors_total: by `error_kind`; those that were never queued too.
    eta_error: |predicted - real| / real of the time that was left at the middle of requests that ended well.
    """

    queued: int
    running: int
    queued_seconds: float
    submitted_total: int
    completed_total: int
    errors_total: dict[str, int]
    time_to_free: Spread
    admission_wait: Spread
    request_seconds: Spread
    eta_error: Spread
    replicas: tuple[ReplicaStats, ...]

    @property
    def ready(self) -> bool:
        """Whether every replica's ranks are there."""
        return all(replica.ready for replica in self.replicas)

    @property
    def restarts_total(self) -> int:
        return sum(replica.restarts_total for replica in self.replicas)

    @property
    def work(self) -> Work:
        """Of all replicas; `busy_seconds_total` by rank of a replica is meaningless here, so it is left out."""
        total = Work()
        for replica in self.replicas:
            total = total.plus(replica.work)
        return Work(**{**vars(total), "busy_seconds_total": ()})
