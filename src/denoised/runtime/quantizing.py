"""From settings to the feature: which components are quantized how, and what came of it, for receipts."""

from __future__ import annotations

from typing import Any

from torch import nn

from denoised import hf
from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError
from denoised.features import quantize
from denoised.runtime import offloading, weights
from denoised.runtime.came_quantized import again_problem, cut_problem
from denoised.spec.model_spec import ModelSpec

DONE = "denoised_quantized"  # on a component


def asked(pipe: Any, spec: ModelSpec, config: EngineConfig) -> dict[str, str]:
    """Component to method; a file is the method of its kind.

    Raises:
        InvalidConfigError: the pipeline has no such component.
    """
    names = {part: quantize.GGUF if value.endswith(".gguf") else value for part, value in config.quantized.items()}
    if "" in names:
        names |= dict.fromkeys(spec.denoisers, names.pop(""))
    known = [name for name, part in hf.components(pipe).items() if isinstance(part, nn.Module)]
    for name in names:
        if name not in known:
            raise InvalidConfigError(
                f"quantization names {name!r}, and {spec.pipeline} has the components {', '.join(known)}; use those."
            )
    if config.quantized and not names:
        raise InvalidConfigError(
            f"quantization={config.quantization!r}: {spec.pipeline} has no component named transformer or unet; name "
            "one with its method."
        )
    return names


def check(pipe: Any, spec: ModelSpec, config: EngineConfig) -> None:
    """What this model or this device refuses, before anything is changed. Raises InvalidConfigError."""
    wanted = asked(pipe, spec, config)
    for name, part in _models(pipe).items():
        came = quantize.existing(part, component=name)
        if came is not None:
            _check_existing(came, config, wanted, part, is_denoiser=name in spec.denoisers)
    for name, method in wanted.items():
        first = next(getattr(pipe, name).parameters())
        quantize.check(method, first.device, first.dtype)


def _check_existing(
    came: quantize.Done, config: EngineConfig, wanted: dict[str, str], part: nn.Module, *, is_denoiser: bool
) -> None:
    """Weights that came quantized are taken as they are: whole, and once."""
    name = came.component
    if name in wanted:
        raise InvalidConfigError(again_problem(name, f"{came.method} in {came.layers} layers"))
    if offloading.is_asked(config) and next(part.parameters()).device.type == "cpu":
        raise InvalidConfigError(
            f"enable_cpu_offload and enable_layerwise_offload read weights from their files again on the CPU, and "
            f"those of {name} came quantized and stay mapped; leave them off."
        )
    is_encoder = hf.reads_text(name, part)
    problem = cut_problem(name, config.parallel_config, is_denoiser=is_denoiser, is_encoder=is_encoder)
    if problem is not None:
        raise InvalidConfigError(problem)


def apply(pipe: Any, spec: ModelSpec, config: EngineConfig) -> None:
    """Quantize what is asked for, after all that cuts weights and before the first is read."""
    for name, method in asked(pipe, spec, config).items():
        part = getattr(pipe, name)
        patterns = spec.unquantized if name in spec.denoisers else ()
        done = quantize.apply(part, method, component=name, patterns=patterns, later=weights.later)
        setattr(part, DONE, done)


def report(pipe: Any) -> list[dict[str, Any]]:
    """What is quantized on this rank, by component; also what came so."""
    found = (vars(part).get(DONE) or quantize.existing(part, component=name) for name, part in _models(pipe).items())
    return [done.as_dict() for done in found if done is not None]


def methods(pipe: Any) -> list[str]:
    """What is quantized how, alike on all ranks: a part of what makes a model another one."""
    found = ((name, vars(part).get(DONE)) for name, part in _models(pipe).items())
    return [f"{name} {done.method}" for name, done in found if done is not None]


def _models(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in hf.components(pipe).items() if isinstance(part, nn.Module)}
