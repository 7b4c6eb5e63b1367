"""Finding the spec of a pipeline: declared by class name, or inferred from what the pipeline says about itself."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from denoised.spec import families
from denoised.spec.model_spec import Kind, ModelSpec


def declared_specs() -> dict[str, ModelSpec]:
    """Pipeline class name to spec."""
    return {spec.pipeline: spec for spec in families.ALL}


def resolve(pipeline: Any) -> ModelSpec:
    """The spec of a pristine pipeline: denoisers that it really has, the rest declared or inferred."""
    spec = declared_specs().get(type(pipeline).__name__) or _inferred(pipeline)
    present = tuple(name for name in spec.denoisers if getattr(pipeline, name, None) is not None)
    return replace(spec, denoisers=present)


def _inferred(pipeline: Any) -> ModelSpec:
    return ModelSpec(pipeline=type(pipeline).__name__, kind=_kind(pipeline), declared=False)


def _kind(pipeline: Any) -> Kind:
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if any(name.startswith("audio_") for name in parameters) and "height" not in parameters:
        return "audio"
    return "video" if "num_frames" in parameters else "image"
