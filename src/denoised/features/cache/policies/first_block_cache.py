"""First-block cache: the special case of DBCache in which the first block alone decides, after the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from denoised.checks import bounded, check_fields
from denoised.features.cache.policy import Look, Past, Step

NAME = "first_block_cache"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `cache_config`, as in diffusers' FirstBlockCacheConfig."""

    threshold: float = bounded(0.05, minimum=0, maximum=100, help="change of what the first block adds")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache:
    threshold: float
    look: Look = Look(probe="residual", first=1)
    name: str = NAME

    def asks(self, past: Past, step: Step) -> bool:
        return self.threshold > 0 and step.possible and past.seen > 0

    def decide(self, past: Past, step: Step, change: float | None) -> tuple[bool, Past]:
        skips = self.asks(past, step) and change is not None and change < self.threshold
        return (True, past.skip()) if skips else (False, past.computed())


def make(config: Any) -> FirstBlockCache:
    return FirstBlockCache(threshold=config.threshold)
