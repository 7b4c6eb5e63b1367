"""A picture of numbers that are not numbers is black, and looks like an answer: it is refused before it is decoded."""

from __future__ import annotations

import torch

from denoised.errors import InvalidRequestError
from denoised.steps.forward import Call


def check(call: Call) -> None:
    """Refuse to decode latents that are not finite.

    Raises:
        InvalidRequestError: denoising overflowed, or a schedule of this length does not exist for this scheduler.
    """
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            raise InvalidRequestError(
                "denoising gave numbers that are not finite; use more steps, less guidance, or another dtype."
            )
