"""What comes out of the engine: results with their receipts, and what is told on the way. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from denoised.request import PromptDict


@dataclass(frozen=True, kw_only=True)
class RankWork:
    """What one rank did for one request: denoiser forwards that ran there, rows in them, seconds.

    `counts` says which denoiser had how many of the rows, and what features did inside: collectives and their bytes,
    tiles, gathered blocks. `idle_seconds` of `seconds` were spent waiting for other pipeline stages.
    """

    rank: int
    forwards: int
    rows: int
    seconds: float
    idle_seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What really ran for one request. Counted where it happened, never derived from the settings.

    `notes` are the pipeline's own warnings, such as a setting that it did not use. Of `steps`, those up to
    `resumed_from_step` were not computed again: they came from a checkpoint. `queued_seconds`: from submission until
    the ranks began; `queued_ticks`: the engine's ticks that began in that time, so that 0 is a wait that was shorter
    than the tick that ran. `loras`: name, scale and number of layers of each adapter that acted. `quantized`:
    method, number of layers and bytes before and after of each component, on the first rank. `cache`: the steps
    that a cache computed and skipped, in all and by row (`runtime/cache_report.py`). `quality`: what was asked for,
    the cache that was chosen for it, what that is expected to do, and the share of row steps that it skipped.
    """

    model: str
    pipeline: str
    world_size: int
    parallel: dict[str, int]
    dtype: str
    device: str
    seed: int
    steps: int
    ranks: list[RankWork]
    rows_joined: int = 0
    encoder_cache_hits: int = 0
    encoder_cache_misses: int = 0
    restarts: int = 0
    resumed_from_step: int = 0
    replica: int = 0
    queued_seconds: float = 0.0
    queued_ticks: int = 0
    stage_seconds: dict[str, float] = field(default_factory=dict)
    peak_memory_mb: float = 0.0
    stage_peak_memory_mb: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    cache: dict[str, Any] | None = None
    quality: dict[str, Any] | None = None
    loras: list[dict[str, Any]] = field(default_factory=list)
    quantized: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def line(self) -> str:
        """The receipt as one readable line."""
        ranks = ", ".join(f"rank {r.rank}: {r.forwards} forwards" for r in self.ranks)
        stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.stage_seconds.items())
        extra = f", {self.rows_joined} rows joined" if self.rows_joined else ""
        extra += f", {self.encoder_cache_hits} encoder cache hits" if self.encoder_cache_hits else ""
        extra += f", {_skipped(self.cache)} row steps skipped" if self.cache else ""
        extra += f", {self.restarts} restarts" if self.restarts else ""
        extra += f", resumed from step {self.resumed_from_step}" if self.resumed_from_step else ""
        return (
            f"{self.model}: {self.steps} steps ({ranks}{extra}); {stages}; seed {self.seed}, {self.dtype} on "
            f"{self.device}, peak {self.peak_memory_mb:.0f} MB"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _skipped(cache: dict[str, Any]) -> str:
    return f"{cache['skipped']} of {cache['computed'] + cache['skipped']}"


ErrorKind = Literal["invalid_request", "aborted", "timeout", "queue_full", "out_of_memory", "engine"]


@dataclass(frozen=True, kw_only=True)
class OmniRequestOutput:
    """The result of one request. `error` is set, and the media are empty, if it failed.

    `images` are PIL images (or arrays, as `output_type` says); `videos` lists of frames; `audios` arrays
    [channels, samples]; `latents` the final latents if `output_type="latent"`. `error_kind` says whose fault an error
    was, for programs.
    """

    request_id: str
    prompt: PromptDict
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    audios: list[Any] = field(default_factory=list)
    latents: Any = None
    trajectory_latents: list[Any] | None = None
    trajectory_timesteps: list[float] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    stage_durations: dict[str, float] = field(default_factory=dict)
    peak_memory_mb: float = 0.0
    receipt: Receipt | None = None
    error: str | None = None
    error_kind: ErrorKind | None = None
    finished: bool = True


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Steps done so far of one request. `position`: requests before it, 0 if it runs. `eta_seconds`: until its end."""

    request_id: str
    step: int
    total_steps: int
    position: int = 0
    eta_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Preview:
    """What the model makes of a request so far: `images` as PIL images (of a video: frames). `index` counts from 0."""

    request_id: str
    index: int
    step: int
    images: list[Any]


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint after `step` steps of a request, as `Request.resume` takes it."""

    request_id: str
    step: int
    checkpoint: Any
