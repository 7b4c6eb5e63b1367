"""Counting at the client: what becomes of requests, and the sums of ranks over their generations."""

from __future__ import annotations

from collections import Counter

from denoised.outputs import OmniRequestOutput
from denoised.runtime.protocol import Ticked
from denoised.runtime.stats import Spread, Work

SPREADS = ("time_to_free", "admission_wait", "request_seconds", "eta_error")


class ReplicaMeter:
    """One replica's ranks, one generation after another: sums go on where the last ones stopped."""

    def __init__(self) -> None:
        self._before, self._now = Work(), Work()
        self.restarts = 0
        self.memory_mb = self.lora_mb = 0.0
        self.loras = 0

    def heard(self, word: Ticked) -> None:
        self._now, self.memory_mb = word.work, word.memory_mb
        self.loras, self.lora_mb = word.loras, word.lora_mb

    def restarted(self) -> None:
        self.restarts += 1
        self._before, self._now = self.work, Work()

    @property
    def work(self) -> Work:
        return self._before.plus(self._now)


class ClientMeter:
    """What became of requests."""

    def __init__(self) -> None:
        self.submitted = self.completed = 0
        self.errors: Counter[str] = Counter()
        self.spreads: dict[str, Spread] = {name: Spread() for name in SPREADS}

    def add(self, name: str, value: float) -> None:
        self.spreads[name] = self.spreads[name].plus(value)

    def ended(self, output: OmniRequestOutput, seconds: float) -> None:
        """A request has its output, so long after it came."""
        if output.error is None:
            self.completed += 1
            self.add("request_seconds", seconds)
        else:
            self.errors[output.error_kind or "engine"] += 1
