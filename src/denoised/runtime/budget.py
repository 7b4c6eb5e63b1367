"""How good pictures have to stay, and the cache that keeps to it at the least work: by what was measured, not guessed.

Pure: no tensors, no models, no files. Quality is the SSIM of a picture to the one that the same engine makes without a
cache: 1 for equal pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a cache's settings did to some pictures of `num_steps` steps.

    skipped: share of the row steps that were skipped. work: share of the blocks' runs that were left, which tells
    caches apart that compute some blocks in every step. ssim: mean over the pictures; worst: of the worst of them.
    """

    backend: str
    config: dict[str, Any]
    num_steps: int
    num_pictures: int
    skipped: float
    work: float
    ssim: float
    worst: float


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Settings, and all that was measured with them."""

    backend: str
    config: dict[str, Any]
    measured: tuple[Measured, ...]

    @property
    def worst(self) -> float:
        """SSIM of the worst picture, whatever its number of steps."""
        return min(one.worst for one in self.measured)

    @property
    def work(self) -> float:
        return _mean([one.work for one in self.measured])

    @property
    def num_steps(self) -> list[int]:
        """The numbers of steps that pictures were measured with, the least first."""
        return sorted({one.num_steps for one in self.measured})

    def expected(self, num_steps: int) -> Measured:
        """What was measured at the nearest number of steps."""
        return min(self.measured, key=lambda one: (abs(one.num_steps - num_steps), one.num_steps))


def choices(measured: Sequence[Measured]) -> list[Choice]:
    """The measurements by their settings; settings that never skipped are none."""
    groups: dict[str, list[Measured]] = {}
    for one in measured:
        groups.setdefault(json.dumps([one.backend, one.config], sort_keys=True), []).append(one)
    firsts = [(group[0], tuple(group)) for group in groups.values()]
    found = [Choice(backend=first.backend, config=first.config, measured=group) for first, group in firsts]
    return [choice for choice in found if choice.work < 1]


def choose(measured: Sequence[Measured], least: float) -> Choice | None:
    """The settings with the least work of those whose worst picture has this SSIM at every number of steps."""
    good = [choice for choice in choices(measured) if choice.worst >= least]
    return min(good, key=lambda choice: (choice.work, -choice.worst), default=None)


def best(measured: Sequence[Measured]) -> Choice | None:
    """The settings with the best worst picture."""
    return max(choices(measured), key=lambda choice: choice.worst, default=None)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
