"""The caches of Cache-DiT: DBCache (the first blocks decide, the blocks between are reused, the last ones computed),
TaylorSeer (Liu et al., 2025, arXiv:2503.06923: a Taylor expansion stands for the blocks between), and SCM (masks that
say which steps are computed)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from denoised.checks import bounded, check_fields
from denoised.features.cache.masks import MASKS, mask
from denoised.features.cache.policy import Look, Past, Step, warmed_up

NAME = "cache_dit"
_WARM = {"warmup_ratio": 0.16}
LADDER = (
    *(_WARM | {"residual_diff_threshold": value} for value in (0.12, 0.24)),
    *(_WARM | {"residual_diff_threshold": value, "enable_taylorseer": True} for value in (0.12, 0.24)),
    _WARM | {"residual_diff_threshold": 0.35, "max_continuous_cached_steps": 4},
    _WARM | {"residual_diff_threshold": 0.5, "max_continuous_cached_steps": 6},
    _WARM | {"residual_diff_threshold": 1.0, "max_continuous_cached_steps": 10},
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Keys of `cache_config`; -1 is no limit."""

    Fn_compute_blocks: int = bounded(1, minimum=1, help="first blocks, always computed; their change decides")
    Bn_compute_blocks: int = bounded(0, minimum=0, help="last blocks, always computed")
    max_warmup_steps: int = bounded(4, minimum=1, help="first steps that are always computed")
    warmup_ratio: float = bounded(0.0, minimum=0, maximum=1, help="the same as a share of the steps; the more count")
    max_cached_steps: int = bounded(-1, minimum=-1, help="skipped steps of a request at most")
    max_continuous_cached_steps: int = bounded(3, minimum=-1, help="skipped steps in a row at most")
    residual_diff_threshold: float = bounded(0.24, minimum=0, maximum=100, help="change that forces a step")
    enable_taylorseer: bool = bounded(False, help="expand what blocks added instead of reusing it")
    taylorseer_order: int = bounded(1, minimum=1, maximum=8, help="of that expansion")
    scm_steps_mask_policy: str | None = bounded(None, choices=MASKS, help="which steps may be skipped")
    scm_steps_policy: str = bounded(
        "dynamic", choices=("dynamic", "static"), help="dynamic: those that the threshold allows; static: all of them"
    )

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class DBCache:
    config: Config
    look: Look
    name: str = NAME

    def asks(self, past: Past, step: Step) -> bool:
        config = self.config
        if not self._may_skip(past, step) or self._is_static(step):
            return False
        in_a_row, in_all = config.max_continuous_cached_steps, config.max_cached_steps
        return config.residual_diff_threshold > 0 and not (0 <= in_a_row <= past.run or 0 <= in_all <= past.skipped)

    def decide(self, past: Past, step: Step, change: float | None) -> tuple[bool, Past]:
        is_close = change is not None and change < self.config.residual_diff_threshold
        skips = (self._may_skip(past, step) and self._is_static(step)) or (self.asks(past, step) and is_close)
        return (True, past.skip()) if skips else (False, past.computed())

    def _may_skip(self, past: Past, step: Step) -> bool:
        """Neither a warm-up step nor one that the mask has computed. A mask may end the warm-up before its time."""
        steps = self._mask(step)
        if steps and past.seen:
            return step.possible and step.number < len(steps) and not steps[step.number]
        num, ratio = self.config.max_warmup_steps, self.config.warmup_ratio
        return step.possible and warmed_up(past, step, num=num, ratio=ratio)

    def _is_static(self, step: Step) -> bool:
        return bool(self._mask(step)) and self.config.scm_steps_policy == "static"

    def _mask(self, step: Step) -> tuple[bool, ...]:
        name = self.config.scm_steps_mask_policy
        return mask(name, step.num_steps) if name is not None and step.num_steps else ()


def make(config: Any) -> DBCache:
    order = config.taylorseer_order if config.enable_taylorseer else 0
    look = Look(probe="residual", first=config.Fn_compute_blocks, last=config.Bn_compute_blocks, order=order)
    return DBCache(config=config, look=look)
