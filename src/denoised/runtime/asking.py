"""What `Omni` is asked for at once: requests to be made, and their outputs in the order in which they were asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from denoised.errors import DenoisedError, InvalidRequestError
from denoised.outputs import OmniRequestOutput
from denoised.request import OmniDiffusionSamplingParams, Request
from denoised.runtime.failures import kind_of

SamplingParams = OmniDiffusionSamplingParams


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is asked of the engine: `request` makes and checks the request of this id."""

    request_id: str
    prompt: Any
    request: Callable[[], Request]


def rejected(request_id: str, prompt: Any, error: DenoisedError) -> OmniRequestOutput:
    shown: Any = prompt if isinstance(prompt, dict) else {"prompt": str(prompt)}
    return OmniRequestOutput(request_id=request_id, prompt=shown, error=str(error), error_kind=kind_of(error))


def in_order(ids: list[str], finished: Iterator[OmniRequestOutput]) -> list[OmniRequestOutput]:
    outputs = {output.request_id: output for output in finished}
    return [outputs[request_id] for request_id in ids]


def one_each(params: Any, count: int) -> Sequence[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise InvalidRequestError(
            f"sampling_params has {len(params)} entries for {count} prompts; give one, or one each."
        )
    return list(params)


def shows_nothing(request: Request) -> Request:
    """Previews would be drawn, and nobody would see them."""
    if request.service.num_previews:
        raise InvalidRequestError(
            f"num_previews={request.service.num_previews}: Omni gives outputs alone; use AsyncOmni, or 0."
        )
    return request
