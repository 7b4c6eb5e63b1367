"""What a cache did for one request, for its receipt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from denoised.features.guidance import Work
from denoised.steps.forward import Decision

# Ranks along these axes share each forward, so that all of them decided the same.
SHARING = ("pipeline", "ring", "ulysses", "tensor")


def report(work: Sequence[Work], axes: dict[str, int]) -> dict[str, Any] | None:
    """Steps computed and skipped, in all and by row; None without a cache. `work`: by rank.

    A row's `steps` has 1 for each that was computed and 0 for each that was skipped, in order.
    """
    stride = 1
    for axis in SHARING:
        stride *= axes.get(axis, 1)
    rows: dict[tuple[str, int, int], list[Decision]] = {}
    for did in work[::stride]:
        for component, branch, decision in did.decisions:
            rows.setdefault((component, branch, decision.row), []).append(decision)
    if not rows:
        return None
    told = [_row(*key, decisions) for key, decisions in sorted(rows.items())]
    everything = [decision for decisions in rows.values() for decision in decisions]
    computed = sum(decision.computed for decision in everything)
    backend = everything[0].by
    return {"backend": backend, "computed": computed, "skipped": len(everything) - computed, "rows": told}


def _row(component: str, branch: int, row: int, decisions: list[Decision]) -> dict[str, Any]:
    steps = "".join(str(int(decision.computed)) for decision in decisions)
    told = {"component": component, "branch": branch, "row": row, "steps": steps}
    measured = [list(decision.values) for decision in decisions]
    return told | ({"measured": measured} if any(measured) else {})


def inert(found: dict[str, Any] | None) -> list[str]:
    """The note of a cache that never skipped."""
    if found is None or found["skipped"] or any("measured" in row for row in found["rows"]):
        return []
    most = max(len(row["steps"]) for row in found["rows"])
    return [
        f"warning: cache_backend={found['backend']!r} did not act: all of up to {most} steps of a row were computed; "
        "raise its threshold or lower its warm-up in cache_config, or ask for more steps."
    ]
