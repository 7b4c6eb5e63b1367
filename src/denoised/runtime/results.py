"""A request on this rank, from admission to its output and receipt."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from denoised.errors import InvalidRequestError, RequestAbortedError, one_line
from denoised.features import lora
from denoised.features.guidance import Work
from denoised.outputs import OmniRequestOutput, RankWork, Receipt
from denoised.request import Request
from denoised.runtime import cache_report, memory, program, vae_flags
from denoised.runtime.failures import kind_of
from denoised.runtime.model_info import ModelInfo
from denoised.steps.forward import Stage
from denoised.steps.task import Task
from denoised.steps.trap import StepObserver
from denoised.steps.unknown import MissingValueError

if TYPE_CHECKING:
    from denoised.runtime.checkpoints import Saver
    from denoised.runtime.previews import Memory


class CallError(RuntimeError):
    """An error inside a component call, as the program sees it."""


@dataclass(kw_only=True)
class InFlight:
    """A request on this rank.

    told: the last iteration that was looked at for checkpoints and previews. resumed_from: the iteration that its
    checkpoint is of. queued: seconds from its submission until it began here; queued_ticks: ticks that began in that
    time. A preview has a `parent`, its number, and the step that it shows.
    """

    request: Request
    task: Task
    observer: StepObserver | None
    started: float
    step: int = 0
    total_steps: int = 0
    reported: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {stage.value: 0.0 for stage in Stage})
    peaks_mb: dict[str, float] = field(default_factory=dict)
    cache_hits: int = 0
    cache_misses: int = 0
    resumed_from: int = 0
    queued: float = 0.0
    queued_ticks: int = 0
    told: int = 0
    loras: list[dict[str, Any]] = field(default_factory=list)
    lora_places: list[tuple[lora.Place, ...]] = field(default_factory=list)
    quantized: list[dict[str, Any]] = field(default_factory=list)
    saver: Saver | None = None
    memory: Memory | None = None
    num_recalled: int = 0
    num_previews: int = 0
    parent: InFlight | None = None
    preview: int = 0
    preview_step: int = 0

    @property
    def needs_its_start(self) -> bool:
        """Whether it ended because its checkpoint did not hold enough to go on."""
        journal = self.task.journal
        failed_in_replay = self.task.error is not None and journal is not None and journal.replays
        return failed_in_replay or isinstance(self.task.error, MissingValueError)

    def rose_to(self, stage: Stage, mb: float) -> None:
        """The most memory that was in use while this stage ran."""
        self.peaks_mb[stage.value] = max(self.peaks_mb.get(stage.value, 0.0), mb)

    def report(self, step: int, total: int) -> None:
        self.step, self.total_steps = step, total
        self.task.at(step, total)


def failed(request: Request, error: Exception) -> OmniRequestOutput:
    """The output of a request that failed; other requests are not touched."""
    text = str(error) if isinstance(error, InvalidRequestError | RequestAbortedError | CallError) else one_line(error)
    return OmniRequestOutput(
        request_id=request.request_id, prompt=request.prompt, error=text, error_kind=kind_of(error)
    )


def output(flight: InFlight, work: list[Work], info: ModelInfo, axes: dict[str, int]) -> OmniRequestOutput:
    """The output of a request that ended. `work` is what each rank did for it."""
    media = program.media(flight.task.value, flight.request.params, info)
    receipt = _receipt(flight, work, info, axes)
    total = time.perf_counter() - flight.started
    return OmniRequestOutput(
        request_id=flight.request.request_id,
        prompt=flight.request.prompt,
        images=media.images,
        videos=media.videos,
        audios=media.audios,
        latents=media.latents,
        trajectory_latents=flight.observer.latents if flight.observer else None,
        trajectory_timesteps=flight.observer.timesteps if flight.observer else None,
        metrics={"seconds": total, "steps_per_second": receipt.steps / max(total, 1e-9)},
        stage_durations=dict(flight.seconds),
        peak_memory_mb=receipt.peak_memory_mb,
        receipt=receipt,
    )


def _receipt(flight: InFlight, work: list[Work], info: ModelInfo, axes: dict[str, int]) -> Receipt:
    cached = cache_report.report(work, axes)
    return Receipt(
        model=info.model,
        pipeline=info.pipeline,
        world_size=len(work),
        parallel={name: size for name, size in axes.items() if size > 1},
        dtype=info.dtype,
        device=info.device,
        seed=flight.request.seed,
        steps=flight.step,
        resumed_from_step=flight.resumed_from,
        queued_seconds=round(flight.queued, 6),
        queued_ticks=flight.queued_ticks,
        ranks=[
            RankWork(
                rank=rank,
                forwards=did.forwards,
                rows=did.rows,
                seconds=round(did.seconds, 6),
                idle_seconds=round(did.idle_seconds, 6),
                counts=dict(did.counts),
            )
            for rank, did in enumerate(work)
        ],
        rows_joined=sum(w.rows_joined for w in work),
        encoder_cache_hits=flight.cache_hits,
        encoder_cache_misses=flight.cache_misses,
        stage_seconds={name: round(seconds, 6) for name, seconds in flight.seconds.items()},
        peak_memory_mb=memory.peak_mb(),
        stage_peak_memory_mb=_peaks([flight.peaks_mb, *(did.peaks_mb for did in work)]),
        versions=memory.versions(),
        cache=cached,
        loras=flight.loras,
        quantized=flight.quantized,
        notes=[*flight.task.notes, *_inert(work), *cache_report.inert(cached), *_unkept(flight), *_idle(flight, work)],
    )


def _peaks(found: list[dict[str, float]]) -> dict[str, float]:
    """The highest of each stage."""
    names = [stage.value for stage in Stage if any(stage.value in peaks for peaks in found)]
    return {name: round(max(peaks.get(name, 0.0) for peaks in found), 1) for name in names}


def _inert(work: list[Work]) -> list[str]:
    """What was asked for and had nothing to act on in this request."""
    notes = vae_flags.inert([did.counts for did in work])
    if any(did.counts["vae_patch_single_tile"] for did in work):
        notes.append(
            "vae_patch_parallel_size did not act: the picture is one tile of this VAE; every rank computed it."
        )
    return notes


def _idle(flight: InFlight, work: list[Work]) -> list[str]:
    """Layers that an adapter was made for and that never ran it. Of a request that began in its middle, blocks that a
    cache skips may have run before."""
    if flight.resumed_from and any(did.counts["cache_blocks_skipped"] for did in work):
        return []
    ranks = zip(*(did.loras for did in work), strict=True)
    told = zip(flight.loras, flight.lora_places, ranks, strict=True)
    found = [lora.problem(one["name"], places, acted) for one, places, acted in told if one["scale"]]
    return [problem for problem in found if problem is not None]


def _unkept(flight: InFlight) -> list[str]:
    """Why checkpoints and previews that were asked for were not made."""
    journal = flight.task.journal
    if journal is None or not journal.problem:
        return []
    return [f"checkpoint_every and num_previews did not act: {journal.problem}."]
