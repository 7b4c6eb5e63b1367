"""What stands for skipped blocks: the value that they last added, or its Taylor expansion over the steps since."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from denoised.features.cache.fitting import fitted


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """terms: the value at step `at`, then its derivatives by steps, as differences of computed steps give them."""

    terms: tuple[Tensor, ...]
    at: int

    @staticmethod
    def of(value: Tensor, at: int, *, order: int, earlier: Expansion | None) -> Expansion:
        """With a newly computed value. Each difference needs one computed step more, so orders come one by one."""
        terms = [value]
        if earlier is not None:
            for term in earlier.terms[:order]:
                terms.append((terms[-1] - fitted(term, value.shape)) / (at - earlier.at))
        return Expansion(terms=tuple(terms), at=at)

    def value(self, at: int) -> Tensor:
        """The sum of terms x distance^i / i!."""
        result, distance = self.terms[0], at - self.at
        for power, term in enumerate(self.terms[1:], start=1):
            result = result + term * (distance**power / math.factorial(power))
        return result

    @property
    def num_bytes(self) -> int:
        return sum(term.nbytes for term in self.terms)
