"""What a caller asks for, checked against what the model accepts and made complete: a `Request` that can be queued."""

from __future__ import annotations

import secrets
from typing import Any

from denoised.config import EngineConfig
from denoised.errors import InvalidRequestError
from denoised.request import OmniDiffusionSamplingParams, Request, Service, as_prompt
from denoised.runtime import cost, model_info, room
from denoised.runtime.adapters import Names, check_scale_has_adapter
from denoised.runtime.kept import check_service


def accept(
    request_id: str,
    prompt: Any,
    params: OmniDiffusionSamplingParams,
    service: Service,
    info: model_info.ModelInfo,
    config: EngineConfig,
    loras: Names,
) -> Request:
    """The request, with the model's defaults and a seed in it.

    Raises:
        InvalidRequestError: the model cannot run it, or it can never fit into memory, or an adapter is not there.
    """
    check_scale_has_adapter(params, info.defaults)
    prompt, params = info.complete(as_prompt(prompt), params)
    model_info.check(prompt, params, info, config)
    if info.footprint is not None:
        room.check(cost.shape_of(prompt, params, info), params, info.footprint, info)
    check_service(service, info)
    seed = params.seed if params.seed is not None else secrets.randbits(31)
    state = None
    if params.generator is not None:
        seed, state = _randomness(params.generator)
        params = params.without_generator()
    request = Request(
        request_id=request_id, prompt=prompt, params=params, seed=seed, generator_state=state, service=service
    )
    return loras.complete(request)


def _randomness(generator: Any) -> tuple[int, Any]:
    """The seed and the state of a generator, which is not advanced."""
    if getattr(getattr(generator, "device", None), "type", None) != "cpu":
        raise InvalidRequestError(
            f"generator={generator!r:.60}: must be one torch.Generator of the CPU; or give a seed."
        )
    return generator.initial_seed() % 2**63, generator.get_state()
