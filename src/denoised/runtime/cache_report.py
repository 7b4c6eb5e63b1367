"""What a cache did for one request, for its receipt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    numbers = [decision.step for decision in decisions]
    return told | ({"measured": measured, "numbers": numbers} if any(measured) else {})


def inert(found: dict[str, Any] | None, *, by_quality: bool = False) -> list[str]:
    """The note of a cache that never skipped, be it in one of a model's experts or guidance branches alone.

    by_quality: the engine chose its settings, so that no others can be given.
    """
    if found is None or any("measured" in row for row in found["rows"]):
        return []
    places: dict[tuple[str, int], list[str]] = {}
    for row in found["rows"]:
        places.setdefault((row["component"], row["branch"]), []).append(row["steps"])
    idle = {place: rows for place, rows in places.items() if all("0" not in steps for steps in rows)}
    if not idle:
        return []
    most = max(len(steps) for rows in idle.values() for steps in rows)
    where = "" if len(idle) == len(places) else f" in {_names(list(idle), list(places))}"
    way = "ask for a lower quality" if by_quality else "raise its threshold or lower its warm-up in cache_config"
    return [
        f"warning: cache_backend={found['backend']!r} did not act{where}: all of up to {most} steps of a row were "
        f"computed; {way}, or ask for more steps."
    ]


def _names(idle: list[tuple[str, int]], places: list[tuple[str, int]]) -> str:
    """Components of which all branches are among them; of others the branches."""
    found: dict[str, None] = {}
    for component, branch in idle:
        is_whole = all(place in idle for place in places if place[0] == component)
        found[component if is_whole else f"branch {branch} of {component}"] = None
    return ", ".join(found)
