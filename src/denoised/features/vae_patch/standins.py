"""What stands for the output of an encoder or decoder while its calls are listed. Knows nothing of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class HandedOn:
    """Stands for what call `number` gives beside its output, for the next call of its tile."""

    number: int


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a VAE takes what its encoder and decoder give.

    Args:
        standin: of a call's first argument, what is cut and blended in place of its output.
        is_pair: the output comes with something for the next call (features of earlier frames).
    """

    standin: Callable[[Tensor], Tensor]
    is_pair: bool = False

    def answer(self, x: Tensor, number: int) -> Any:
        return (self.standin(x), HandedOn(number=number)) if self.is_pair else self.standin(x)

    def found(self, output: Tensor) -> Any:
        return (output, None) if self.is_pair else output


def _no_channels(x: Tensor) -> Tensor:
    """One value long each way, because lengths are divided by; no channels, so that nothing is computed with it."""
    return x.new_empty((x.shape[0], 0, *[1] * (x.ndim - 2)))


def _one_value(x: Tensor) -> Tensor:
    """For a VAE that writes tiles into a picture of its own: fits everywhere."""
    return x.new_zeros((1,) * x.ndim)


# In the order in which they are tried.
FORMS = (Form(standin=_no_channels), Form(standin=_no_channels, is_pair=True), Form(standin=_one_value))
