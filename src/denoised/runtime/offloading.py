"""From settings to the feature: whether weights leave the device while nobody needs them, and where they are then."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError
from denoised.features.offload import FIELDS, Home, Offload
from denoised.runtime import weights
from denoised.runtime.unread import Unread
from denoised.spec.model_spec import ModelSpec

WHOLE, LAYERS, _ = FIELDS


def is_asked(config: EngineConfig) -> bool:
    return config.enable_cpu_offload or config.enable_layerwise_offload


def offload_of(pipe: Any, spec: ModelSpec, config: EngineConfig) -> Offload | None:
    """What moves the weights of this pipeline; None if nothing is asked for.

    Raises:
        InvalidConfigError: this model's cannot be moved. Nothing has been changed.
    """
    if not is_asked(config):
        return None
    denoisers = [getattr(pipe, name) for name in spec.denoisers]
    field = WHOLE if config.enable_cpu_offload else LAYERS
    if not denoisers:
        raise InvalidConfigError(
            f"{field}=True: {spec.pipeline} has no component named transformer or unet that could take turns; leave "
            "it off."
        )
    device = _device(denoisers)
    if device.type == "cpu" and not all(_is_in_files(model) for model in denoisers):
        raise InvalidConfigError(
            f"{field}=True: on the CPU weights are read from their files again, and a pipeline object has none; save "
            f"it with save_pretrained() and give the folder, or leave {field} off."
        )
    num_layers = config.layerwise_num_gpu_layers if config.enable_layerwise_offload else None
    found = Offload(Home(away=weights.away, fetch=weights.fetch), device=device, num_layers=num_layers)
    for model in denoisers:
        found.check(model)
    return found


def _device(models: Iterable[nn.Module]) -> torch.device:
    return next(parameter.device for model in models for parameter in model.parameters())


def _is_in_files(model: nn.Module) -> bool:
    return any(isinstance(parameter, Unread) for parameter in model.parameters())
