"""Requests of tiny checkpoints on one rank without an engine: for tests of checkpoints and previews on every row."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline

from denoised.features import lora
from denoised.outputs import Saved
from denoised.request import Request, Service
from denoised.runtime import checkpoints, denoiser, model_info, previews
from denoised.runtime.flights import Runway
from denoised.runtime.results import InFlight
from denoised.spec.registry import resolve
from denoised.steps.forward import Stage
from tests.contract.support import as_omni, folder, latent_type, request_of, seed_of


@dataclass(kw_only=True)
class Run:
    """What came of a request: its value, forwards of its denoiser, checkpoints, and flights of its previews."""

    flight: InFlight
    forwards: int = 0
    saved: list[Saved] = field(default_factory=list)
    previews: list[InFlight] = field(default_factory=list)

    @property
    def tensors(self) -> list[torch.Tensor]:
        assert self.flight.task.error is None, self.flight.task.error
        return _tensors(self.flight.task.value)


class Bench:
    """One pipeline, ready to run. `scheduler`: a class to use in place of its own."""

    def __init__(self, name: str, scheduler: type | None = None) -> None:
        import tests.contract.rank_setup  # noqa: F401

        torch.set_num_threads(1)
        self.name = name
        self.pipeline: Any = DiffusionPipeline.from_pretrained(folder(name))
        self.pipeline.set_progress_bar_config(disable=True)
        if scheduler is not None:
            self.pipeline.scheduler = scheduler.from_config(self.pipeline.scheduler.config)  # type: ignore[attr-defined]
        spec = resolve(self.pipeline)
        self.info = model_info.describe(self.pipeline, spec, model=name, device="cpu", dtype="float32", defaults={})
        sites = lora.survey(self.pipeline, spec.denoisers)
        denoiser.trap(self.pipeline, spec)
        adapters = lora.Adapters(sites, device=torch.device("cpu"), max_adapters=1)
        self.runway = Runway(self.pipeline, spec, self.info, checkpoints.fingerprint(self.pipeline), adapters)

    def request(self, index: int = 0, service: Service | None = None, **changes: Any) -> Request:
        prompt, params = as_omni(request_of(self.name, index), seed_of(index), latent_type(self.name))
        params = dataclasses.replace(params, **changes)
        return Request(request_id="r", prompt=prompt, params=params, seed=seed_of(index), service=service or Service())

    def run(self, request: Request) -> Run:
        """The request to its end, its previews beside it, as the engine would."""
        run = Run(flight=self.runway.request(request))
        self._finish(run, run.flight)
        return run

    def _finish(self, run: Run, flight: InFlight) -> None:
        task = flight.task
        task.advance()
        while not task.done:
            self._look(run, flight)
            for call in list(task.pending):
                self._resolve(run, flight, call)
            task.pending.clear()
            task.advance()

    def _look(self, run: Run, flight: InFlight) -> None:
        saved, preview = self.runway.between(flight)
        run.saved += [saved] if saved is not None else []
        if preview is not None:
            run.previews.append(preview)
            self._finish(run, preview)

    def _resolve(self, run: Run, flight: InFlight, call: Any) -> None:
        is_denoiser = call.target.stage is Stage.DENOISE
        value = previews.recall(call, flight, self.info)
        if value is None:
            value = call.run() if is_denoiser else flight.task.run_atomic(call)
        if flight.memory is not None:
            flight.memory.keep(call, value)
        run.forwards += is_denoiser
        flight.task.learn(call, value)
        call.source.resolve(value)


@functools.lru_cache(maxsize=2)
def bench(name: str) -> Bench:
    """Built once for tests that follow each other."""
    return Bench(name)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in _tensors(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in _tensors(item)]
    return [] if value is None else [torch.as_tensor(value)]


def equal(a: Run, b: Run) -> bool:
    """Whether two runs gave the same bytes."""
    return len(a.tensors) == len(b.tensors) > 0 and all(map(torch.equal, a.tensors, b.tensors))
