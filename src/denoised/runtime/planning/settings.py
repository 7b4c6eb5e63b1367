"""Facts of a model under settings of the engine: quantization of its weights, and kernels for its attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from denoised import hf
from denoised.config import EngineConfig
from denoised.features import attention_backend
from denoised.runtime.planning.facts import ModelFacts
from denoised.runtime.planning.packing import dtype_of, packed
from denoised.spec.model_spec import ModelSpec
from denoised.spec.registry import resolve


def with_settings(facts: ModelFacts, pipeline: Any, config: EngineConfig, *, device: str) -> ModelFacts:
    """The same facts under `config`; those of the model without settings come in.

    Args:
        pipeline: of which they are, with weights or without.
        config: its model, quantization and attention_backend count.
        device: the kind of device, cpu or cuda, which need not be here.

    Raises:
        InvalidConfigError: the engine would refuse these settings for this model.
        ModelError: a component comes quantized, in a way that only loading it would tell the bytes of.
    """
    spec = resolve(pipeline)
    facts = dataclasses.replace(facts, device=device)
    facts = dataclasses.replace(facts, kernels=_kernels(facts, pipeline, spec, config))
    return packed(facts, pipeline, spec, config)


def _kernels(facts: ModelFacts, pipeline: Any, spec: ModelSpec, config: EngineConfig) -> tuple[str, ...]:
    chosen = attention_backend.choice(config.attention_backend, spec.denoisers)
    device = torch.device(facts.device)
    found = attention_backend.check_planned(hf.components(pipeline), chosen, device=device, dtype=dtype_of(facts))
    return tuple(sorted({kernel.name for kernel in found.values()}))
