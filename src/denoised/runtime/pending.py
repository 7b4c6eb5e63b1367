"""A request without an output, and what ends it before its time."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from denoised.errors import RequestAbortedError, RequestTimeoutError
from denoised.outputs import OmniRequestOutput, Preview, Progress, Saved
from denoised.request import Request
from denoised.runtime.calibrations import Promise
from denoised.runtime.conditions import sizes
from denoised.runtime.failures import refused

_log = logging.getLogger(__name__)

Listener = Callable[[Progress | Preview | Saved | OmniRequestOutput], None]
Stop = RequestAbortedError | RequestTimeoutError


@dataclasses.dataclass(kw_only=True)
class Pending:
    """A request without an output yet. `stop`: why it is to end before its time, if it is."""

    request: Request
    listener: Listener
    restarts: int = 0
    stop: Stop | None = None

    def tell(self, event: Progress | Preview | Saved | OmniRequestOutput) -> None:
        """A listener that raises harms nobody but itself."""
        try:
            self.listener(event)
        except Exception:
            _log.exception("the listener of request %s raised", self.request.request_id)

    def finished(
        self, output: OmniRequestOutput, replica: int | None, promise: Promise | None = None
    ) -> OmniRequestOutput:
        """The output as its listener gets it: with its replica and restarts, or with the reason of its stop.

        promise: of its quality.
        replica: where it ran; None: who says it knows better.
        """
        if self.stop is not None and output.error_kind == "aborted":
            return refused(self.request, self.stop)
        if output.receipt is None or replica is None:
            return output
        receipt = dataclasses.replace(output.receipt, replica=replica, restarts=self.restarts)
        receipt = promise.onto(receipt, sizes(output)) if promise is not None else receipt
        return dataclasses.replace(output, receipt=receipt)


def too_late(request: Request) -> RequestTimeoutError:
    """What a request past its deadline is told."""
    return RequestTimeoutError(
        f"timeout={request.service.timeout:g} s: the request was not done by then and was stopped; allow it more time."
    )


def took(output: OmniRequestOutput) -> float | None:
    """Seconds of the ranks that a request had."""
    if output.receipt is None:
        return None
    ranks = output.receipt.ranks
    ends = sum(seconds for name, seconds in output.stage_durations.items() if name != "denoise")
    return ends + sum(rank.seconds for rank in ranks) / max(len(ranks), 1)
