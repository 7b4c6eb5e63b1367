"""The soak in short (benchmarks/soak.py, which takes 2,000 requests), and what the full one found."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from benchmarks.soak import soak
from benchmarks.soak_report import Sample, ranks_slope, rows, server_slope

from tests import tiny

pytestmark = [
    *(pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS),
    pytest.mark.filterwarnings("default::ResourceWarning"),  # of connections that are cut on purpose
]
DOCS = Path(__file__).parents[2] / "docs"


def test_every_request_is_answered_right_while_clients_leave_and_a_rank_is_killed() -> None:
    found = soak(60, kill_every=40, clients=6, size=8)
    assert found.problems == []
    assert (found.requests, found.answered, found.refused) == (60, 45, 3)
    assert found.cancelled + found.answered_before_they_were_cancelled == 12
    assert found.cancelled > 6
    assert found.ranks_killed == found.ranks_started_anew == 1
    assert found.run_again > 0, "requests that were in flight when the rank was killed"
    assert sum(found.ways.values()) == 45
    assert len(found.ways) == 5
    rows(json.loads(json.dumps(dataclasses.asdict(found))))


def test_slopes_are_of_warm_processes_and_of_one_generation_each() -> None:
    """Ranks that start small and grow by 10 MB in 1,000 answers, whatever those before them held."""
    samples = [
        Sample(answers=at, since=at % 500, server=100 + at / 500, ranks=1000 + at // 500 + (at % 500) / 100)
        for at in range(0, 1000, 2)
    ]
    assert ranks_slope(samples) == pytest.approx(10)
    assert server_slope(samples) == pytest.approx(2)
    assert server_slope(samples[:50]) is None


@pytest.mark.parametrize("path", [*DOCS.glob("soak.json")], ids=lambda path: path.name)
def test_the_page_says_what_the_last_full_soak_found(path: Path) -> None:
    """After another: python -m benchmarks.soak --output docs/soak.json --page docs/server.md."""
    found = json.loads(path.read_text())
    assert found["problems"] == []
    page = (DOCS / "server.md").read_text()
    for name, value in {"requests": "", **rows(found)}.items():
        assert f"| {name} | {value}" in page
