"""Step computation masks: which denoising steps are computed and which may be skipped, for any number of steps.

A mask is told as alternating runs of computed and skipped steps of 28, computed first (the runs are those that
Cache-DiT documents for its policies), and is stretched to other numbers of steps in proportion.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate

_RUNS: dict[str, tuple[int, ...]] = {
    "slow": (8, 1, 3, 2, 3, 2, 2, 2, 1, 3, 1),
    "medium": (6, 1, 2, 3, 2, 3, 2, 3, 2, 3, 1),
    "fast": (6, 1, 1, 3, 1, 4, 1, 5, 1, 4, 1),
    "ultra": (4, 2, 1, 5, 1, 6, 1, 7, 1),
}
MASKS = tuple(_RUNS)


@lru_cache(maxsize=256)
def mask(name: str, num_steps: int) -> tuple[bool, ...]:
    """For each step whether it must be computed; the first and the last always are.

    As many of the first steps are computed as of the same share of 28, rounded: so each number of steps has the
    policy's share of computed ones, and a policy that is faster never computes more.
    """
    runs, scale = _RUNS[name], num_steps / 28
    ends = list(accumulate(runs))
    computed = [0, *accumulate(run if number % 2 == 0 else 0 for number, run in enumerate(runs))]
    shares = [interpolated(step / scale, [0, *ends], computed) * scale for step in range(num_steps + 1)]
    counts = [math.floor(share + 0.5) for share in shares]
    within = [after > before for before, after in zip(counts, counts[1:])]
    return tuple(on or place in (0, num_steps - 1) for place, on in enumerate(within))


def interpolated(x: float, xs: list[int], ys: list[int]) -> float:
    """The value at `x` of the line through the points (xs, ys), xs growing."""
    place = min(bisect_right(xs, x), len(xs) - 1)
    share = (x - xs[place - 1]) / (xs[place] - xs[place - 1])
    return ys[place - 1] + share * (ys[place] - ys[place - 1])
