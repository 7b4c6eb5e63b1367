"""What this rank's memory holds, by the arithmetic of the plan on the loaded pipeline: for `runtime/room.py`."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from denoised.config import EngineConfig
from denoised.errors import InvalidConfigError, one_line
from denoised.runtime.cost import tokens_of
from denoised.runtime.model_info import ModelInfo
from denoised.runtime.planning.ask import Ask
from denoised.runtime.planning.facts import ModelFacts
from denoised.runtime.planning.layout import of_config
from denoised.runtime.planning.memory import memory
from denoised.runtime.planning.reading import facts_of
from denoised.runtime.planning.settings import with_settings
from denoised.runtime.rescue import resident_weights
from denoised.runtime.room import MB, Footprint

_log = logging.getLogger(__name__)
# Of a device's memory: the rest is the driver's context, kernels and fragmentation.
USABLE = 0.92


def measure(pipeline: Any, info: ModelInfo, config: EngineConfig) -> Footprint | None:
    """None where there is no limit, or no way to predict what requests need.

    Raises:
        InvalidConfigError: a `memory_limit_mb` that the weights alone exceed, or that cannot be held.
    """
    limit = _limit(config)
    if limit is None:
        return None
    facts = None
    try:
        facts = facts_of(pipeline, Ask(), model=info.model, dtype=info.dtype)
        stored = with_settings(facts, pipeline, config, device=torch.device(info.device).type)
        found = _footprint(stored, info, config, limit)
    except Exception as error:
        if facts is not None and isinstance(error, InvalidConfigError):
            raise  # not unpredictable but refused, as it would be a moment later
        if config.memory_limit_mb is None:
            _log.warning("memory is not predicted: %s", one_line(error))
            return None
        raise InvalidConfigError(
            f"memory_limit_mb={config.memory_limit_mb}: what {info.pipeline} needs cannot be predicted "
            f"({one_line(error)}); leave it out."
        ) from error
    if config.memory_limit_mb is not None and found.room <= 0:
        raise InvalidConfigError(
            f"memory_limit_mb={config.memory_limit_mb}: the weights of a rank alone take about "
            f"{found.weights / MB:.0f} MB; raise it, or divide the model over more ranks."
        )
    return found if found.room > 0 else None  # more weights than memory: they are not all there at once


def _limit(config: EngineConfig) -> float | None:
    if config.memory_limit_mb is not None:
        return float(config.memory_limit_mb * MB)
    return USABLE * torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


def _footprint(facts: ModelFacts, info: ModelInfo, config: EngineConfig, limit: float) -> Footprint:
    layout = of_config(config.parallel_config)
    tokens = _own_tokens(facts, info)
    one = dataclasses.replace(facts, num_rows=1, decode_bytes=0.0)
    longer = dataclasses.replace(one, tokens=dataclasses.replace(facts.tokens, image=2 * facts.tokens.image))
    single, double = memory(layout, one), memory(layout, longer)
    per_token = (double.working - single.working) / tokens
    decoding = memory(layout, dataclasses.replace(facts, num_rows=0)).working
    return Footprint(
        limit=limit,
        weights=resident_weights(single, facts, config),
        row=max(0.0, single.working - per_token * tokens),
        row_per_token=per_token,
        decode_per_token=decoding / tokens,
        latent_per_token=facts.latent_values * facts.itemsize / tokens,
        elements_per_token=facts.latent_values / tokens,
        num_ranks=config.parallel_config.cfg_parallel_size,
    )


def _own_tokens(facts: ModelFacts, info: ModelInfo) -> int:
    """Tokens of the request that the facts are of, as those of requests are counted."""
    sides = facts.size[:2] or (None, None)  # width, height; sound has none
    frames = facts.size[2] if len(facts.size) > 2 else 1
    return tokens_of(sides[1], sides[0], (frames - 1) // info.frame_multiple + 1, info)


def max_elements(footprint: Footprint | None) -> float:
    """Elements of latents whose rows may share a forward (`Turns.max_elements`)."""
    if footprint is None:
        return float("inf")
    return footprint.room * footprint.elements_per_token / max(footprint.row_per_token, 1e-9)
