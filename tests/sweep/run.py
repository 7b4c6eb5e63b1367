"""The whole sweep: every case on one rank and on two, as the JSON that docs/pipelines.md is made from."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import diffusers

from tests.ranks import run_on_ranks
from tests.sweep import checks, scope
from tests.sweep.case import Case
from tests.sweep.cases import CASES

SECONDS = 280.0  # for one class


def sweep(names: Sequence[str], previous: dict[str, Any]) -> dict[str, Any]:
    """Results of the named classes, or of all; classes that are not named keep their `previous` results."""
    found = {name: entry for name, entry in previous["pipelines"].items() if name in CASES and name not in names}
    broken: dict[str, str] = {n: why for n, why in previous.get("unbuilt", {}).items() if n not in names}
    for name in names or CASES:
        try:
            found[name] = entry(CASES[name])
            broken.pop(name, None)
        except Exception as error:
            broken[name] = "the plain pipeline fails: " + " ".join(f"{type(error).__name__}: {error}".split())[:200]
        print(name, found.get(name, broken.get(name)), file=sys.stderr, flush=True)
    return {
        "diffusers": diffusers.__version__,
        "pipelines": dict(sorted(found.items())),
        "unbuilt": dict(sorted({**{n: w for n, w in broken.items() if n in CASES}, **scope.UNBUILT}.items())),
        "others": scope.OTHERS,
        "needs_input": scope.out_of_scope(),
    }


def entry(case: Case) -> dict[str, Any]:
    """What the page says of one class."""
    alone, divided = both(case.pipeline)
    return {
        "kind": case.kind,
        "checks": {**alone.checks, **divided.checks},
        "differences": {**alone.differences, **divided.differences},
        "forwards": {"alone": alone.forwards, "two ranks": divided.forwards},
        "double": case.double,
    }


def both(name: str) -> tuple[checks.Report, checks.Report]:
    (alone,) = run_on_ranks(checks.on_one_rank, 1, name, timeout=SECONDS)
    divided = run_on_ranks(checks.on_two_ranks, 2, name, alone.references, timeout=SECONDS)
    return alone, divided[0]
