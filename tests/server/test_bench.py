"""`denoised bench`: what it sends is what was stated, and what it tells is what happened."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from denoised.cli.load import Mix, Sent, plan, summary
from denoised.cli.load_http import address
from denoised.errors import InvalidConfigError
from tests import tiny
from tests.cli import denoised
from tests.server.live import KEY, Live

pytestmark = [pytest.mark.filterwarnings(w) for w in tiny.UPSTREAM_WARNINGS]


def test_a_plan_is_poisson_and_keeps_the_shares() -> None:
    mix = Mix(num_requests=4000, request_rate=8.0, bodies=({"weight": 3}, {}))
    planned = plan(mix)
    assert planned == plan(mix)
    gaps = [after[1] - before[1] for before, after in zip(planned, planned[1:])]
    assert statistics.fmean(gaps) == pytest.approx(1 / 8, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.1), "as of an exponential distribution"
    assert sum(kind == 0 for kind, _ in planned) / 4000 == pytest.approx(0.75, rel=0.05)
    assert {at for _, at in plan(Mix(num_requests=9))} == {0.0}


def test_a_summary_counts_what_was_completed() -> None:
    sent = [Sent(number=i, kind=0, seconds=float(i), first_step=0.5 * i, etas=((2.0, i), (1.0, 1.0))) for i in (4, 1)]
    sent += [Sent(number=n, kind=0, seconds=99.0, error="queue_full") for n in (2, 3)]
    found = summary("m", sent, 2.0, 0.25)
    assert (found.requests, found.completed, found.throughput, found.errors) == (4, 2, 1.0, {"queue_full": 2})
    assert (found.latency_p50, found.latency_p95, found.first_step_p95) == (1.0, 4.0, 2.0)
    assert (found.eta_error_first, found.eta_error_half, found.admission_wait) == (0.75, 0.0, 0.25)


def bench(shapes: Live, tmp_path: Path, *more: object) -> dict[str, Any]:
    output = tmp_path / "found.json"
    common = ("--api-key", KEY, "--size", "64x64", "--num-inference-steps", 3, "--output", output)
    done = denoised("bench", shapes.url, *common, *more)
    assert done.exit_code == 0, done.output
    assert "denoised bench: shapes" in done.stdout
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def test_a_load_on_a_server(shapes: Live, tmp_path: Path) -> None:
    """Two at a time run and two may wait: nobody is refused with four, but some are with nine; as many steps ran as
    the mix says."""
    mix = tmp_path / "mix.json"
    mix.write_text(json.dumps([{"prompt": "a star"}, {"num_inference_steps": 5, "true_cfg_scale": 1.0}]))
    before = shapes.stats()
    found = bench(shapes, tmp_path, "--num-requests", 12, "--concurrency", 4, "--mix", mix)
    kinds = [kind for kind, _ in plan(Mix(num_requests=12, bodies=({}, {})))]
    assert (found["requests"], found["completed"], found["errors"]) == (12, 12, {})
    assert shapes.stats().work.steps_total - before.work.steps_total == 3 * kinds.count(0) + 5 * kinds.count(1)
    assert shapes.stats().completed_total - before.completed_total == 12
    assert 0 < found["first_step_p50"] < found["latency_p50"] <= found["latency_p95"] <= found["seconds"]
    assert found["throughput"] == pytest.approx(12 / found["seconds"])
    assert found["eta_error_half"] is not None
    crowd = bench(shapes, tmp_path, "--num-requests", 18, "--concurrency", 9, "--request-rate", 1000)
    assert crowd["errors"]["queue_full"] == 18 - crowd["completed"] > 0
    wrong = bench(shapes, tmp_path, "--num-requests", 2, "--size", "65x64")
    assert wrong["errors"] == {"invalid_value": 2}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("http://127.0.0.1:9",), "nothing answers at 127.0.0.1:9"),
        (("http://",), "url='http://'"),
        (("http://x", "--concurrency", "0"), "concurrency=0"),
        (("http://x", "--mix", "no.json"), "mix='no.json'"),
        (("http://x", "--", "--cfg-parallel-size", "2"), "'--cfg-parallel-size' is for a server of our own"),
        (("/nowhere/model",), "cannot be served"),
    ],
)
def test_what_cannot_be_measured_says_why(arguments: tuple[str, ...], says: str) -> None:
    done = denoised("bench", *arguments)
    assert done.exit_code == 2
    assert says in done.stderr, done.stderr


def test_urls() -> None:
    place = address("https://example.com/a/v1/", "k")
    assert (place.host, place.port, place.path, place.secure, place.key) == ("example.com", 443, "/a", True, "k")
    with pytest.raises(InvalidConfigError, match="must be http"):
        address("http://x:port")


def test_a_url_needs_no_torch() -> None:
    program = "import sys, denoised.cli.bench; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_a_model_is_served_meanwhile() -> None:
    done = denoised("bench", "shapes", "--num-requests", 4, "--size", "64x64", "--", "--num-threads", "1")
    assert done.exit_code == 0, done.output
    assert "4 completed" in done.stdout
