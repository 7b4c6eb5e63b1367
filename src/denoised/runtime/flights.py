"""How a request takes off on a rank: its program, its journal, its task; anew, from a checkpoint, or for a preview."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from denoised import hf
from denoised.errors import InvalidRequestError, one_line
from denoised.features.cache import keeping
from denoised.features.lora import Adapters
from denoised.outputs import Saved
from denoised.request import Request
from denoised.runtime import checkpoints, previews, program, quantizing
from denoised.runtime.model_info import ModelInfo
from denoised.runtime.results import InFlight
from denoised.spec.model_spec import ModelSpec
from denoised.steps.journal import Journal
from denoised.steps.replay import Past, Replay
from denoised.steps.task import Task
from denoised.steps.trap import StepObserver


class Runway:
    """Starts tasks on one pipeline. `fingerprint`: of the model, for checkpoints; `sees_all`: as in `Journal`.

    caches: denoisers remember steps; a request whose checkpoint does not hold them goes on from its start.
    """

    def __init__(
        self,
        pipeline: Any,
        spec: ModelSpec,
        info: ModelInfo,
        fingerprint: str,
        adapters: Adapters,
        sees_all: bool = True,
        caches: bool = False,
    ) -> None:
        self._pipeline, self._spec, self._info, self._fingerprint = pipeline, spec, info, fingerprint
        self._sees_all, self.adapters, self._caches = sees_all, adapters, caches
        self._device = hf.execution_device(pipeline)
        self._arities: dict[str, Any] = {}
        self._quantized = quantizing.report(pipeline)

    def request(self, request: Request) -> InFlight:
        """A request, from its checkpoint if it has one.

        Raises:
            InvalidRequestError: the checkpoint is not of this request, or of another model; an adapter cannot be had.
        """
        self.adapters.take(request.request_id, request.loras)
        try:
            return self._request(request)
        except BaseException:
            self.adapters.release(request.request_id)
            raise

    def _request(self, request: Request) -> InFlight:
        replay, states = None, dict[tuple[str, int], dict[str, Any]]()
        if request.resume is not None:
            past = checkpoints.open_past(request.resume, request, model=self._fingerprint, loras=self._loras(request))
            states = self._remembered(request.resume)
            replay = Replay(past, device=self._device) if states or not self._caches else None
        service = request.service
        observer = StepObserver() if request.params.return_trajectory_latents else None
        journal = None
        if replay is not None or service.checkpoint_every or service.num_previews:
            journal = Journal(
                every=service.checkpoint_every,
                shows=service.num_previews > 0,
                keeps_all=observer is not None,
                sees_all=self._sees_all,
                replay=replay,
            )
        flight = self._flight(request, journal, observer)
        flight.resumed_from = flight.told = replay.past.iteration if replay is not None else 0
        if service.num_previews:
            flight.memory = previews.Memory()
        flight.task.states.update(states)
        if request.resume is not None and replay is None:
            flight.task.note("resume: computed from the start, for the checkpoint does not hold what a cache keeps.")
        elif request.resume is not None and not self._caches and checkpoints.remembered(request.resume) is not None:
            flight.task.note(
                "resume: the checkpoint was made with a cache; here every step from there on is computed."
            )
        return flight

    def _remembered(self, checkpoint: Any) -> dict[tuple[str, int], dict[str, Any]]:
        """What its cache kept of steps; nothing if this engine has none.

        Raises:
            InvalidRequestError: the checkpoint is damaged.
        """
        found = checkpoints.remembered(checkpoint) if self._caches else None
        try:
            return keeping.restore(found or (), self._device)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidRequestError(f"resume: the checkpoint is damaged ({one_line(error)}).") from error

    def again(self, flight: InFlight) -> InFlight:
        """The same request from its start, because what its checkpoint kept is not enough."""
        fresh = self.request(dataclasses.replace(flight.request, resume=None))
        fresh.started, fresh.num_previews = flight.started, flight.num_previews
        fresh.queued, fresh.queued_ticks = flight.queued, flight.queued_ticks
        fresh.task.note(f"resume: computed from the start, for {flight.task.error}.")
        return fresh

    def preview(self, parent: InFlight) -> InFlight:
        """A run that ends at once with what its parent is now."""
        assert parent.task.journal is not None, "requests with previews have one"
        past = parent.task.journal.past()
        journal = Journal(replay=Replay(past, device=self._device, to_clean=True))
        flight = self._flight(previews.request_of(parent), journal, None)
        flight.parent, flight.preview, flight.preview_step = parent, parent.num_previews, parent.step
        parent.num_previews += 1
        return flight

    def between(self, flight: InFlight) -> tuple[Saved | None, InFlight | None]:
        """A checkpoint of where a request is now, and a preview of it, if it is time for them.

        What goes wrong with them is a note in the request's receipt.
        """
        journal = flight.task.journal
        if flight.task.done or flight.parent is not None or journal is None or not journal.is_between:
            return None, None
        if journal.iteration <= flight.told:
            return None, None
        flight.told = journal.iteration
        try:
            saved = self._checkpoint(flight, journal.past()) if _is_saved(flight) else None
            return saved, self.preview(flight) if previews.is_due(flight) else None
        except Exception as error:
            journal.problem = one_line(error)
            return None, None

    def _checkpoint(self, flight: InFlight, past: Past) -> Saved:
        if flight.saver is None:
            flight.saver = checkpoints.Saver(
                flight.request, model=self._fingerprint, loras=self._loras(flight.request)
            )
        # Of several ranks of the cfg axis each has the states of its own rows.
        known = keeping.keep(flight.task.states) if self._caches and self._sees_all else None
        checkpoint = flight.saver.save(past, known)
        return Saved(request_id=flight.request.request_id, step=past.iteration, checkpoint=checkpoint)

    def _flight(self, request: Request, journal: Journal | None, observer: StepObserver | None) -> InFlight:
        flight = InFlight(
            request=request,
            task=None,  # type: ignore[arg-type]
            observer=observer,
            started=time.perf_counter(),
            queued=max(0.0, time.time() - request.came) if request.came else 0.0,
        )
        call = program.build(
            self._pipeline, request, self._info, report=flight.report, observer=observer, journal=journal
        )
        flight.task = Task(
            request.request_id,
            call,
            seed=request.seed,
            arities=self._arities,
            defer=self._spec.defer,
            journal=journal,
            adapters=self.adapters.active(request.loras),
        )
        flight.loras, flight.lora_places = self.adapters.told(request.loras), self.adapters.places(request.loras)
        flight.quantized = self._quantized
        return flight

    def _loras(self, request: Request) -> list[list[Any]]:
        return self.adapters.fingerprint(request.loras)


def _is_saved(flight: InFlight) -> bool:
    every = flight.request.service.checkpoint_every
    return every > 0 and flight.told % every == 0
