"""What a soak finds: memory over time, the result, and its table in docs/server.md."""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.processes import Holdings

HOLDINGS = tuple(field.name for field in dataclasses.fields(Holdings))
BEGIN, END = "<!-- soak -->\n", "<!-- /soak -->\n"
# Megabytes that 1,000 requests may add to what a process holds once it is warm: of the two ranks, a twentieth, which
# their allocator takes in steps as shapes meet that have not met before.
FLAT = {"server": 4.0, "ranks": 64.0}
# Answers after which a process counts as warm.
WARM_SERVER, WARM_RANK = 200, 300
# More than before, without being left over: asyncio starts a thread for a task that finds all others busy.
SPARE = {"threads": 2}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Memory at a moment, in MB; `answers` so far, and `since` the ranks that are there were started."""

    answers: int
    since: int
    server: float
    ranks: float


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a soak found. `problems` is empty if all is as it should be; slopes are MB for 1,000 requests."""

    requests: int
    answered: int
    cancelled: int
    answered_before_they_were_cancelled: int
    refused: int
    ranks_killed: int
    ranks_started_anew: int
    run_again: int
    ways: dict[str, int]
    seconds: float
    server_mb: tuple[float, float]
    ranks_mb: tuple[float, float]
    server_slope: float | None
    ranks_slope: float | None
    time_to_free: float
    before: Holdings
    after: Holdings
    problems: list[str]


def server_slope(samples: Sequence[Sample]) -> float | None:
    """MB for 1,000 answers, once it is warm; None if there is too little to tell."""
    return _slope([(s.answers, s.server) for s in samples if s.answers >= WARM_SERVER])


def ranks_slope(samples: Sequence[Sample]) -> float | None:
    """Of warm ranks, over the answers since they were started; all generations of ranks together."""
    generations: dict[int, list[Sample]] = collections.defaultdict(list)
    for sample in samples:
        if sample.since >= WARM_RANK:
            generations[sample.answers - sample.since].append(sample)
    centred: list[tuple[float, float]] = []
    for found in generations.values():
        middle = statistics.fmean(s.since for s in found), statistics.fmean(s.ranks for s in found)
        centred += [(s.since - middle[0], s.ranks - middle[1]) for s in found]
    return _slope(centred)


def _slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Least squares, for 1,000 answers; None if there is too little to tell."""
    if len({x for x, _ in points}) < 20:
        return None
    xs, ys = zip(*points)
    return round(1000 * statistics.linear_regression(xs, ys).slope, 2)


def ends(values: Sequence[float]) -> tuple[float, float]:
    """Medians of the first and of the last quarter, in MB."""
    if not values:
        return (0.0, 0.0)
    part = max(1, len(values) // 4)
    return round(statistics.median(values[:part]), 1), round(statistics.median(values[-part:]), 1)


def rows(found: dict[str, Any]) -> dict[str, str]:
    """A result, as the table has it."""
    before, after = found["before"], found["after"]
    valid = found["answered"]
    return {
        "requests": f"{found['requests']:,} in {found['seconds'] / 60:.1f} minutes, by plain HTTP and the official "
        "client, sync and async, streamed and as a chat",
        "valid, and every pixel that of the request alone": f"{valid:,}",
        "cancelled by hanging up": f"{found['cancelled']:,}, and "
        f"{found['answered_before_they_were_cancelled']} that were done before; ranks free after "
        f"{found['time_to_free'] * 1000:.0f} ms on average",
        "wrong, and refused with the right status and field": f"{found['refused']:,}",
        "ranks killed (kill -9), and started anew": f"{found['ranks_killed']}; requests that they had, run again and "
        f"right: {found['run_again']}",
        "memory of the server, of the ranks, for 1,000 requests": f"{_mb(found['server_slope'])} of "
        f"{found['server_mb'][1]:.0f}, {_mb(found['ranks_slope'])} of {found['ranks_mb'][1]:.0f}",
        "threads, open files, processes, temporary files": ", ".join(
            f"{before[name]} then {after[name]}" for name in HOLDINGS
        ),
        "left over after SIGTERM": ", ".join(found["problems"]) or "nothing",
    }


def _mb(slope: float | None) -> str:
    return "unknown" if slope is None else f"{slope:+.1f} MB"


def put(page: Path, found: dict[str, Any]) -> None:
    """The table into a page, between its marks."""
    before, _, rest = page.read_text().partition(BEGIN)
    lines = "".join(f"| {name} | {value} |\n" for name, value in rows(found).items())
    page.write_text(f"{before}{BEGIN}\n| | |\n|---|---|\n{lines}\n{END}{rest.partition(END)[2]}")
