"""Under what pictures were made, as far as it bears on what a cache does to them: told by outputs and calibrations.

No torch. Pictures are PIL images, or arrays [height, width, channels] or [channels, height, width].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from denoised.outputs import OmniRequestOutput, Receipt

_CHANNELS = (1, 3, 4)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """sizes: width x height, and frames of videos; empty where nobody saw a picture. quantization: component to
    method. adapters: name @ scale."""

    sizes: list[str]
    dtype: str
    quantization: dict[str, str]
    adapters: list[str]

    def unlike(self, now: Conditions) -> Iterator[tuple[str, str]]:
        """What differs of `now`: as it is here, and as it is there."""
        if self.sizes and now.sizes and not set(now.sizes) <= set(self.sizes):
            yield f"at {_listed(self.sizes)}", f"is {_listed(now.sizes)}"
        if self.dtype != now.dtype:
            yield f"in {self.dtype}", f"is {now.dtype}"
        if self.quantization != now.quantization:
            yield f"with {_methods(self.quantization)}", f"has {_methods(now.quantization)}"
        if self.adapters != now.adapters:
            yield f"with {_adapters(self.adapters)}", f"has {_adapters(now.adapters)}"


def of(outputs: Sequence[OmniRequestOutput]) -> Conditions | None:
    """Of requests of one engine; None: of none that has a receipt."""
    receipt = next((output.receipt for output in outputs if output.receipt is not None), None)
    return (
        None if receipt is None else of_receipt(receipt, sizes=[size for output in outputs for size in sizes(output)])
    )


def of_receipt(receipt: Receipt, *, sizes: Sequence[str]) -> Conditions:
    return Conditions(
        sizes=sorted(set(sizes)),
        dtype=receipt.dtype,
        quantization={entry["component"]: entry["method"] for entry in receipt.quantized},
        adapters=sorted(f"{entry['name']} @ {entry['scale']:g}" for entry in receipt.loras),
    )


def sizes(output: OmniRequestOutput) -> list[str]:
    """Of its pictures and videos."""
    pictures = [_size(picture) for picture in output.images]
    return pictures + [f"{_size(video[0])}x{len(video)}" for video in output.videos if len(video)]


def _size(picture: Any) -> str:
    while isinstance(picture, list | tuple):
        picture = picture[0]
    if isinstance(picture.size, tuple):  # of PIL
        return "{}x{}".format(*picture.size)
    first, *_, last = picture.shape
    height, width = picture.shape[-2:] if first in _CHANNELS and last not in _CHANNELS else picture.shape[:2]
    return f"{width}x{height}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _methods(found: dict[str, str]) -> str:
    return _listed([f"{name} in {method}" for name, method in found.items()]) or "no quantization"


def _adapters(found: list[str]) -> str:
    return f"adapter {_listed(found)}" if found else "no adapter"
