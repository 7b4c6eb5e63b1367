"""TeaCache (Liu et al., 2024, arXiv:2411.19108): a step is skipped while the changes of the first block's modulated
input, rescaled by a polynomial into changes of the output, add up to less than a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from denoised.checks import bounded, check_fields
from denoised.errors import InvalidConfigError
from denoised.features.cache.policy import Look, Past, Step, warmed_up

NAME = "tea_cache"
LADDER = tuple({"rel_l1_thresh": value, "warmup_ratio": 0.16} for value in (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6))


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `cache_config`. coefficients: of the polynomial, highest power first."""

    rel_l1_thresh: float = bounded(0.2, minimum=0, maximum=100, help="sum of rescaled changes that forces a step")
    coefficients: list[float] | None = bounded(None, help="highest power first; default: the model's own")
    max_warmup_steps: int = bounded(1, minimum=1, help="first steps that are always computed")
    warmup_ratio: float = bounded(0.0, minimum=0, maximum=1, help="the same as a share of the steps; the more count")
    probe: str = bounded("input", choices=("input", "timestep"), help="what the coefficients were fitted to")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class TeaCache:
    threshold: float
    coefficients: tuple[float, ...]
    num_warmup: int
    warmup_ratio: float
    look: Look
    name: str = NAME

    def asks(self, past: Past, step: Step) -> bool:
        is_warm = warmed_up(past, step, num=self.num_warmup, ratio=self.warmup_ratio)
        return self.threshold > 0 and step.possible and is_warm and not step.is_last

    def decide(self, past: Past, step: Step, change: float | None) -> tuple[bool, Past]:
        if change is None or not self.asks(past, step):
            return False, past.computed()
        total = sum(past.sums) + self.rescaled(change)
        return (True, past.skip(total)) if total < self.threshold else (False, past.computed())

    def rescaled(self, change: float) -> float:
        """The change of the output that this change of the input foretells; a fit may dip below zero, a change not."""
        value = 0.0
        for coefficient in self.coefficients:
            value = value * change + coefficient
        return max(0.0, value)


def make(config: Any) -> TeaCache:
    """Raises InvalidConfigError: nobody knows the model's coefficients."""
    if not config.coefficients:
        raise InvalidConfigError(
            "cache_config: coefficients of this model are not known; run `denoised calibrate` and give what it "
            'writes, or use cache_backend="cache_dit".'
        )
    return TeaCache(
        threshold=config.rel_l1_thresh,
        coefficients=tuple(config.coefficients),
        num_warmup=config.max_warmup_steps,
        warmup_ratio=config.warmup_ratio,
        look=Look(probe=config.probe, follows=True),
    )
