"""Finding the spec of a pipeline: declared by class name, or inferred from what the pipeline says about itself."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import nn

from denoised import hf
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


# What a denoiser's forward calls the noise level of its input.
_NOISE_LEVELS = frozenset({"timestep", "timestep_ratio", "r"})


def _inferred(pipeline: Any) -> ModelSpec:
    usual = ModelSpec(
        pipeline=type(pipeline).__name__,
        kind=_kind(pipeline),
        declared=False,
        exclusive=hf.changes_modules(pipeline),
    )
    others = (name for name, part in hf.components(pipeline).items() if _denoises(name, part))
    return replace(usual, denoisers=tuple(dict.fromkeys((*usual.denoisers, *others))))


def _denoises(name: str, part: Any) -> bool:
    """Whether a component is told a noise level. VAEs may be too, and control networks, which denoise nothing."""
    if not isinstance(part, nn.Module) or hasattr(part, "decode") or "control" in name:
        return False
    return not _NOISE_LEVELS.isdisjoint(inspect.signature(part.forward).parameters)


def _kind(pipeline: Any) -> Kind:
    parameters = inspect.signature(type(pipeline).__call__).parameters
    if any(name.startswith("audio_") for name in parameters) and "height" not in parameters:
        return "audio"
    return "video" if "num_frames" in parameters else "image"
