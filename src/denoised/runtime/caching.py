"""From settings to the feature: which cache acts on the denoisers, and which ranks decide and gather together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError
from denoised.features import cache, hsdp, pipeline
from denoised.runtime import calibrations
from denoised.runtime.mesh import Mesh
from denoised.spec.model_spec import ModelSpec


def check(pipe: Any, spec: ModelSpec, config: EngineConfig) -> None:
    """What `apply` refuses, with nothing changed. Raises InvalidConfigError."""
    if config.caches and not spec.denoisers:
        raise InvalidConfigError(
            f"cache_backend={config.cache_backend!r}: {spec.pipeline} has no component named transformer for it to "
            "act on; leave it out."
        )
    for name in spec.denoisers if config.caches else ():
        found = calibrations.beside(config.model)
        settings, model = config.cache_config, getattr(pipe, name)
        cache.check(model, spec, str(config.cache_backend), settings, component=name, calibration=found)


def apply(
    pipe: Any,
    spec: ModelSpec,
    config: EngineConfig,
    mesh: Mesh | None,
    *,
    gathers: Mapping[str, hsdp.Gathers],
    stages: Mapping[str, pipeline.Stages],
) -> None:
    """Ranks with parts of a sequence or of the weights share each forward, and must skip the same blocks of it; so do
    stages. Ranks of the cfg axis that shard weights decide for themselves, and gather together.

    Args:
        gathers, stages: by denoiser; empty where weights are whole, or the model is.
    """
    if not config.caches:
        return
    group = mesh.span("ring", "ulysses", "tensor") if mesh is not None else None
    convoy = mesh.group("cfg") if mesh is not None and gathers and mesh.axes["cfg"] > 1 else None
    found = calibrations.beside(config.model)
    for name in spec.denoisers:
        cache.apply(
            getattr(pipe, name),
            spec,
            str(config.cache_backend),
            config.cache_config,
            group=group,
            component=name,
            calibration=found,
            convoy=convoy,
            gathers=gathers.get(name),
            stages=stages.get(name),
        )
