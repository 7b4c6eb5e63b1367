"""Pictures of a request on its way: its program run again from what is known now, without the denoiser, so that what
the last step predicted as the clean sample is decoded by the pipeline's own code.

Such a run is a small task of its own in the engine, which waits for its turn as others do. It cannot change the
request: it has its own scheduler, generator and random state; and what goes wrong in it is a note in the receipt.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch

from denoised.errors import one_line
from denoised.outputs import Preview
from denoised.request import Request
from denoised.runtime import program
from denoised.runtime.model_info import ModelInfo
from denoised.runtime.results import InFlight
from denoised.steps.forward import Call, Stage


def is_due(flight: InFlight) -> bool:
    """Whether the next of its evenly spaced previews should be made now."""
    wanted = flight.request.service.num_previews
    if flight.num_previews >= wanted or not flight.total_steps or flight.step >= flight.total_steps:
        return False
    num_due = flight.step * (wanted + 1) // flight.total_steps
    if flight.resumed_from and not flight.num_previews:  # earlier ones were shown before the checkpoint was made
        flight.num_previews = max(0, num_due - 1)
    return num_due > flight.num_previews


def request_of(flight: InFlight) -> Request:
    """The request whose program shows this one."""
    params = dataclasses.replace(flight.request.params, output_type="pil", return_trajectory_latents=False)
    request_id = f"{flight.request.request_id}/preview-{flight.num_previews}"
    return dataclasses.replace(flight.request, request_id=request_id, params=params, resume=None)


def result(flight: InFlight, info: ModelInfo) -> Preview | None:
    """What a preview's task made; None, and a note on its request, if it could not."""
    assert flight.parent is not None, "only of previews"
    try:
        if flight.task.error is not None:
            raise flight.task.error
        media = program.media(flight.task.value, flight.request.params, info)
        images = _flat(media.images or media.videos[:1])
    except Exception as error:
        flight.parent.task.note(f"num_previews: this pipeline shows none here ({one_line(error, 160)}).")
        return None
    return Preview(
        request_id=flight.parent.request.request_id, index=flight.preview, step=flight.preview_step, images=images
    )


def _flat(images: Any) -> list[Any]:
    """Layers of a picture, and frames of a video, come as lists of their own."""
    return [image for item in images for image in (_flat(item) if isinstance(item, list) else [item])]


class Memory:
    """What a request's encoder calls gave, in order, so that its previews need not encode anything again."""

    def __init__(self) -> None:
        self._values: list[tuple[str, str, Any]] = []

    def keep(self, call: Call, value: Any) -> None:
        if call.target.stage is Stage.ENCODE:
            self._values.append((call.target.name, call.target.method, copy.deepcopy(value)))

    def find(self, number: int, call: Call) -> Any | None:
        """What the encoder call of this number gave, if it was this one."""
        if call.target.stage is not Stage.ENCODE or number >= len(self._values):
            return None
        name, method, value = self._values[number]
        return copy.deepcopy(value) if (name, method) == (call.target.name, call.target.method) else None


def recall(call: Call, flight: InFlight, info: ModelInfo) -> Any | None:
    """What a call of a preview gave when its request made it; None if it must run."""
    if flight.parent is None or flight.parent.memory is None:
        return None
    shorten(call, info)
    if call.target.stage is Stage.ENCODE:
        flight.num_recalled += 1
    return flight.parent.memory.find(flight.num_recalled - 1, call)


def shorten(call: Call, info: ModelInfo) -> None:
    """Of a video only the first latent frame is decoded: dim 2 of [batch, channels, frames, height, width]."""
    if info.kind == "video" and call.target.stage is Stage.DECODE:
        call.args = tuple(_first_frame(value) for value in call.args)
        call.kwargs = {name: _first_frame(value) for name, value in call.kwargs.items()}


def _first_frame(value: Any) -> Any:
    return value[:, :, :1] if isinstance(value, torch.Tensor) and value.dim() == 5 else value
