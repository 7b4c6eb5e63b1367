"""A progress bar over the denoising steps of several requests."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from tqdm.auto import tqdm

from denoised.outputs import OmniRequestOutput, Preview, Progress, Saved


class StepBar:
    """Counts steps of all requests; the total grows as requests say how many steps they have.

    The bar appears with the first step, so that a request that is refused leaves nothing on the screen.
    """

    def __init__(self, num_requests: int, *, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: Any = None
        self._steps: dict[str, tuple[int, int]] = {}
        self._left = num_requests
        self._started = time.time()

    def __enter__(self) -> StepBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, event: Progress | Preview | Saved | OmniRequestOutput) -> None:
        """Draw what an event says, if it says how far a request is."""
        if isinstance(event, OmniRequestOutput):
            self._left -= 1
        elif isinstance(event, Progress):
            self._steps[event.request_id] = (event.step, event.total_steps)
        if self._enabled and self._steps:
            self._draw()

    def _draw(self) -> None:
        if self._bar is None:
            self._bar = tqdm(total=0, unit="step")
            self._bar.start_t = self._started
        self._bar.total = sum(total for _, total in self._steps.values())
        self._bar.n = sum(step for step, _ in self._steps.values())
        self._bar.set_postfix_str(f"{self._left} to go" if self._left > 1 else "")
