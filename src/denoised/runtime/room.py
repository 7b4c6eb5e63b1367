"""What a request needs of a rank's memory, by the arithmetic of `denoised plan`: whether it fits, or ever can.

Of the requests in flight, all keep their latents and encoded prompts (`resident`), and one at a time computes
(`working`): rows that share a forward are bounded by what is left (`Turns.max_elements`). Plain numbers, no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from denoised.errors import InvalidRequestError
from denoised.request import OmniDiffusionSamplingParams
from denoised.runtime.cost import Shape
from denoised.runtime.model_info import ModelInfo

MB = 2**20
# Copies of its latents that a request keeps between steps: its own, its scheduler's, and predictions on their way.
KEPT_LATENTS = 4


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of one request on one rank."""

    resident: float = 0.0
    working: float = 0.0

    @property
    def total(self) -> float:
        return self.resident + self.working


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What one rank of an engine has, and what requests take of it, in bytes. Linear in tokens: between blocks, in
    attention that does not keep its scores, and in VAEs it is.

    limit: of the rank. row: of a row whatever its size (its text); row_per_token: of its image; decode_per_token: of
    the VAE; latent_per_token: of latents, which are so many elements. num_ranks: of the cfg axis, which share rows.
    """

    limit: float
    weights: float
    row: float
    row_per_token: float
    decode_per_token: float
    latent_per_token: float
    elements_per_token: float
    num_ranks: int = 1

    @property
    def room(self) -> float:
        """Beside the weights."""
        return self.limit - self.weights

    def need(self, shape: Shape) -> Need:
        """Of a request of so many tokens, branches and outputs."""
        working = max(fixed + each * shape.tokens for fixed, each in self._works(shape))
        return Need(resident=self._kept(shape) * shape.tokens, working=working)

    def _works(self, shape: Shape) -> tuple[tuple[float, float], ...]:
        """Denoising and decoding: what each takes whatever the size, and for a token."""
        rows = -(-shape.branches * shape.outputs // self.num_ranks)
        return (rows * self.row, rows * self.row_per_token), (0.0, shape.outputs * self.decode_per_token)

    def _kept(self, shape: Shape) -> float:
        return KEPT_LATENTS * shape.outputs * self.latent_per_token

    def most_tokens(self, shape: Shape) -> int:
        """Of the largest request with as many branches and outputs that fits alone."""
        kept = self._kept(shape)
        fits = [(self.room - fixed) / max(kept + each, 1e-9) for fixed, each in self._works(shape)]
        return max(0, int(min(fits)))


def check(shape: Shape, params: OmniDiffusionSamplingParams, footprint: Footprint, info: ModelInfo) -> None:
    """Refuse a request that does not fit even alone.

    Raises:
        InvalidRequestError: with the largest size that does.
    """
    need = footprint.need(shape)
    if need.total <= footprint.room:
        return
    most = footprint.most_tokens(shape)
    side = int(math.sqrt(most / shape.frames)) * info.size_multiple
    ways = [f"at most {side} x {side}"] if side else ["fewer outputs"]
    frames = int(most / (shape.tokens / shape.frames))
    if shape.frames > 1 and frames:
        ways.append(f"at most {(frames - 1) * info.frame_multiple + 1} frames")
    size = f"height x width = {params.height or 'default'} x {params.width or 'default'}"
    raise InvalidRequestError(
        f"{size} needs about {need.total / MB:.0f} MB of a rank, which has {footprint.room / MB:.0f} MB beside the "
        f"weights; ask for {' or '.join(ways)}."
    )
