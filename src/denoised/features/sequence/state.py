"""What is known of one forward while it runs; it dies with the forward."""

from __future__ import annotations

from dataclasses import dataclass, field

from denoised.spec.sequence import Attends


@dataclass(kw_only=True)
class Inside:
    """The attention module that is running: its rules, and whether it was given other hidden states than its own."""

    name: str
    rules: list[Attends]
    given: bool
    num_calls: int = 0

    def next_rule(self) -> Attends | None:
        """The rule of its next call: the last one holds for all further calls."""
        self.num_calls += 1
        return self.rules[min(self.num_calls, len(self.rules)) - 1] if self.rules else None


@dataclass(kw_only=True)
class Forward:
    """One forward under way. streams: full lengths of those that are cut now."""

    streams: dict[str, int] = field(default_factory=dict)
    inside: list[Inside] = field(default_factory=list)
    was_cut: bool = False
    attended: int = 0
    exchanged: int = 0
