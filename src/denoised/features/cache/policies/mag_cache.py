"""MagCache (Ma et al., 2025, arXiv:2506.09045): what blocks add shrinks from step to step by ratios that hardly depend
on the prompt. A step is skipped while the error that these ratios foretell stays small; nothing is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from denoised.checks import bounded, check_fields
from denoised.errors import InvalidConfigError
from denoised.features.cache.policy import Look, Past, Step

NAME = "mag_cache"
LADDER = tuple(
    {"threshold": value, "max_skip_steps": most}
    for value, most in ((0.06, 3), (0.12, 3), (0.25, 4), (0.5, 5), (1.0, 8))
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `cache_config`, as in diffusers' MagCacheConfig. mag_ratios: one a step, of any number of steps."""

    threshold: float = bounded(0.06, minimum=0, maximum=100, help="foretold error that forces a step")
    max_skip_steps: int = bounded(3, minimum=0, help="skipped steps in a row at most")
    retention_ratio: float = bounded(0.2, minimum=0, maximum=1, help="share of the steps that are computed first")
    mag_ratios: list[float] | None = bounded(None, help="size of what blocks add, over that of the step before")

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class MagCache:
    config: Config
    ratios: tuple[float, ...]
    look: Look = Look(probe="none")
    name: str = NAME

    def asks(self, past: Past, step: Step) -> bool:
        return False

    def decide(self, past: Past, step: Step, change: float | None) -> tuple[bool, Past]:
        config = self.config
        if not self._may_skip(past, step):
            return False, past.computed()
        size, error = past.sums or (1.0, 0.0)
        size *= self.ratio(step)
        error += abs(1 - size)
        skips = error < config.threshold and past.run < config.max_skip_steps
        return (True, past.skip(size, error)) if skips else (False, past.computed())

    def ratio(self, step: Step) -> float:
        """The nearest of the ratios to this step's place in the run."""
        last = max(step.num_steps - 1, 1)
        return self.ratios[round(step.number / last * (len(self.ratios) - 1))]

    def _may_skip(self, past: Past, step: Step) -> bool:
        is_early = not past.seen or step.number < int(self.config.retention_ratio * step.num_steps + 0.5)
        return step.possible and step.num_steps > 0 and not is_early


def make(config: Any) -> MagCache:
    """Raises InvalidConfigError: nobody knows the model's ratios."""
    if not config.mag_ratios:
        raise InvalidConfigError(
            "cache_config: mag_ratios of this model are not known; run `denoised calibrate --cache-backend mag_cache` "
            'and give what it writes, or use cache_backend="cache_dit".'
        )
    return MagCache(config=config, ratios=tuple(config.mag_ratios))
