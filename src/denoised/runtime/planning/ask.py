"""The requests that a plan is for."""

from __future__ import annotations

from dataclasses import dataclass

from denoised.checks import bounded, check_fields
from denoised.errors import InvalidRequestError


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Requests of one kind. What is None comes from the pipeline's own defaults."""

    height: int | None = bounded(None, minimum=16, maximum=16384, help="pixels; default: the pipeline's own")
    width: int | None = bounded(None, minimum=16, maximum=16384, help="pixels; default: the pipeline's own")
    num_frames: int | None = bounded(None, minimum=1, maximum=10_000, help="frames; default: the pipeline's own")
    num_inference_steps: int | None = bounded(
        None, minimum=1, maximum=1000, help="denoising steps; default: the pipeline's own"
    )
    text_tokens: int | None = bounded(
        None, minimum=0, maximum=100_000, help="length of the prompt; default: the most that the pipeline takes"
    )
    branches: int | None = bounded(
        None, minimum=1, maximum=16, help="guidance branches of a request; default: what the model's guidance has"
    )
    pictures: int | None = bounded(
        None, minimum=0, maximum=64, help="input pictures, each of about the output's size; default: 1 if needed"
    )
    layers: int | None = bounded(None, minimum=1, maximum=64, help="of a layered picture; default: the pipeline's")
    requests: int = bounded(1, minimum=1, maximum=1024, help="requests in flight together")

    def __post_init__(self) -> None:
        check_fields(self, InvalidRequestError)
