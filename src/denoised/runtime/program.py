"""A request as the program of a task: the keywords of `pipeline(**kwargs)`, and its result as media.

The only place that knows both our names of sampling parameters and the pipelines'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from denoised import hf
from denoised.request import OmniDiffusionSamplingParams, Request
from denoised.runtime.model_info import COUNT_NAMES, ENGINE_FIELDS, ModelInfo, shift_name
from denoised.steps.journal import Journal
from denoised.steps.trap import StepObserver, request_copy


@dataclass(frozen=True, kw_only=True)
class Media:
    """What a pipeline call gave, by kind."""

    images: list[Any]
    videos: list[Any]
    audios: list[Any]
    latents: Any = None


def build(
    pipeline: Any,
    request: Request,
    info: ModelInfo,
    *,
    report: Callable[[int, int], None],
    observer: StepObserver | None,
    journal: Journal | None = None,
) -> Callable[[], Any]:
    """The program of one request: a call without arguments that runs the unmodified pipeline.

    The journal is told the generator, whose state belongs to what is kept of the request.
    """
    own = request_copy(pipeline, report=report, observer=observer)
    _configure(own, request.params)
    kwargs = _own(keywords(request, info, device=hf.execution_device(pipeline)))
    if journal is not None and "generator" in kwargs:
        journal.generators = [kwargs["generator"]]
    return functools.partial(_run_exclusively, own, kwargs) if info.exclusive else lambda: own(**kwargs)


def _run_exclusively(pipeline: Any, kwargs: dict[str, Any]) -> Any:
    """Nobody else runs now, and whoever runs next finds the modules as they were."""
    with hf.same_processors(pipeline):
        return pipeline(**kwargs)


def _own(value: Any) -> Any:
    """A copy that the pipeline may change in place: the request may run again, and others share its values."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(_own(item) for item in value)
    if type(value) is dict:
        return {key: _own(item) for key, item in value.items()}
    return value.copy() if isinstance(value, np.ndarray | Image) else value


def keywords(request: Request, info: ModelInfo, *, device: Any) -> dict[str, Any]:
    """The keywords of the pipeline's `__call__` for one request."""
    params = request.params
    kwargs = {f.name: getattr(params, f.name) for f in fields(params) if f.name not in ENGINE_FIELDS}
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    kwargs |= {k: v for k, v in request.prompt.items() if k != "multi_modal_data" and v is not None}
    kwargs |= dict(request.prompt.get("multi_modal_data") or {})
    if params.pil_image is not None:
        kwargs.setdefault("image", params.pil_image)
    if params.fps is not None:
        kwargs |= {name: params.fps for name in ("frame_rate", "fps") if name in info.parameters}
    kwargs |= _count(params, info) | _randomness(request, info, device) | params.extra_args
    if "output_type" in info.parameters:
        kwargs["output_type"] = "pt" if info.kind == "audio" and params.output_type == "pil" else params.output_type
    return kwargs


def _count(params: OmniDiffusionSamplingParams, info: ModelInfo) -> dict[str, int]:
    if params.num_outputs_per_prompt == 1:
        return {}
    return {next(name for name in COUNT_NAMES if name in info.parameters): params.num_outputs_per_prompt}


def _randomness(request: Request, info: ModelInfo, device: Any) -> dict[str, Any]:
    if "generator" not in info.parameters:
        return {}
    # Noise is drawn on the CPU, so that a seed gives the same picture on every device.
    generator = torch.Generator("cpu").manual_seed(request.seed)
    if request.generator_state is not None:
        generator.set_state(request.generator_state)
    return {"generator": generator}


def _configure(pipeline: Any, params: OmniDiffusionSamplingParams) -> None:
    """Settings that pipelines read from their configuration: on this request's copy only."""
    if params.boundary_ratio is not None:
        hf.set_config(pipeline, boundary_ratio=params.boundary_ratio)
    if params.flow_shift is not None:
        set_flow_shift(pipeline.scheduler, params.flow_shift)


def set_flow_shift(scheduler: Any, shift: float) -> None:
    """Give a scheduler another timestep shift, under the name that its class uses."""
    name = shift_name(scheduler.config)
    assert name is not None, "checked before"
    fresh = type(scheduler).from_config(scheduler.config, **{name: shift})
    observe = scheduler.__dict__.get("_observe_step")
    scheduler.__dict__.update(fresh.__dict__)
    scheduler.__dict__["_observe_step"] = observe


def media(result: Any, params: OmniDiffusionSamplingParams, info: ModelInfo) -> Media:
    """The result of a pipeline call sorted into images, videos and audios, one entry an output."""
    main, sound = _parts(result)
    if params.output_type == "latent":
        return Media(images=[], videos=[], audios=[], latents=main)
    if hasattr(result, "video"):  # one sample, without a batch dimension
        main, sound = [main], None if sound is None else [sound]
    outputs = list(main) if main is not None else []
    audios = list(sound) if sound is not None else []
    if info.kind == "audio":
        return Media(images=[], videos=[], audios=outputs)
    images, videos = (outputs, []) if info.kind == "image" else ([], outputs)
    return Media(images=images, videos=videos, audios=audios)


def _parts(result: Any) -> tuple[Any, Any]:
    """The main output and the sound beside it, if any."""
    for name in ("images", "frames", "video", "audios"):
        if hasattr(result, name):
            return getattr(result, name), getattr(result, "audio", getattr(result, "sound", None))
    first = result[0] if isinstance(result, tuple) else next(iter(result.values()))
    return first, None
