"""What a request needs of a rank's memory, by the arithmetic of `denoised plan`: whether it fits, or ever can.

Of the requests in flight, all keep their latents and encoded prompts (`resident`), and one at a time computes
(`working`): rows that share a forward are bounded by what is left (`Turns.max_elements`). Plain numbers, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of one request on one rank."""

    resident: float = 0.0
    working: float = 0.0

    @property
    def total(self) -> float:
        return self.resident + self.working
