"""The last checkpoint of each request in flight, so that it goes on from there when its ranks die; and what a request
may ask for on its way. No torch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from denoised.errors import InvalidRequestError
from denoised.outputs import Saved
from denoised.request import Request, Service
from denoised.runtime.model_info import ModelInfo

# Of all checkpoints together. Past it the newest are not kept: their requests would start from their beginning.
MAX_BYTES = 2**30


class Kept:
    """Checkpoints by request, at most `max_bytes` of them."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._checkpoints: dict[str, Any] = {}

    @property
    def num_bytes(self) -> int:
        return sum(checkpoint.num_bytes for checkpoint in self._checkpoints.values())

    def keep(self, saved: Saved) -> None:
        """In place of the request's one before it."""
        self._checkpoints.pop(saved.request_id, None)
        if self.num_bytes + saved.checkpoint.num_bytes <= self._max_bytes:
            self._checkpoints[saved.request_id] = saved.checkpoint

    def resumed(self, request: Request) -> Request:
        """The request as it should run now: from its last checkpoint if there is one."""
        checkpoint = self._checkpoints.get(request.request_id)
        return request if checkpoint is None else dataclasses.replace(request, resume=checkpoint)

    def drop(self, request_id: str) -> None:
        """The request is over."""
        self._checkpoints.pop(request_id, None)


def check_service(service: Service, info: ModelInfo) -> None:
    """Refuse previews that cannot be.

    Raises:
        InvalidRequestError: one sentence with the field, the value and the way out.
    """
    if service.num_previews and info.kind == "audio":
        raise InvalidRequestError(
            f"num_previews={service.num_previews}: {info.pipeline} makes sound, which has no picture; use 0."
        )
