"""Predictions against runs: the stored result is this cost model's, its table is the page's, and the machine can be
measured again."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from benchmarks.plan_check import LAYOUTS, RESULT, compared, rank_correlation

from denoised.runtime.plan import HARDWARE, Hardware
from denoised.runtime.planning.measuring import hardware_of, measured
from tests.ranks import run_on_ranks
from tests.test_docs import ROOT

FOUND: dict[str, Any] = json.loads(RESULT.read_text())


def test_stored_predictions_are_those_of_this_cost_model() -> None:
    """After a change: python -m benchmarks.plan_check --predict, then python scripts/plan_table.py."""
    now = compared(FOUND["seconds"], Hardware(**FOUND["hardware"]))
    assert now["predicted"] == pytest.approx(FOUND["predicted"], rel=1e-6)
    assert {k: now[k] for k in ("rank_correlation", "median_error", "largest_error")} == pytest.approx(
        {k: FOUND[k] for k in ("rank_correlation", "median_error", "largest_error")}
    )


def test_predictions_can_be_trusted_for_comparing() -> None:
    """The order is right, and errors are what the page says."""
    assert set(FOUND["seconds"]) == set(LAYOUTS)
    assert FOUND["rank_correlation"] >= 0.9
    assert FOUND["median_error"] <= 0.15
    assert FOUND["largest_error"] <= 0.25


def test_the_page_has_the_table_of_the_result() -> None:
    command = [sys.executable, ROOT / "scripts" / "plan_table.py", "--check"]
    assert subprocess.run(command).returncode == 0, "run: python scripts/plan_table.py"


def test_the_cpu_is_the_one_that_was_measured() -> None:
    cpu, found = HARDWARE["cpu"], FOUND["hardware"]
    measured_too = ("efficiency", "attention_efficiency", "ring_attention", "crowding", "cores")
    for name in ("half_flops", "full_flops", "memory_bandwidth", "link", "latency", *measured_too):
        assert getattr(cpu, name) == pytest.approx(found[name], rel=0.05), name


def test_rank_correlation() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 40]) == 1
    assert rank_correlation([1, 2, 3], [40, 20, 10]) == -1


def this_machine(rank: int, num_ranks: int) -> dict[str, float]:
    import torch
    import torch.distributed as dist

    with torch.no_grad():
        return measured(dist.group.WORLD)


def test_a_machine_can_be_measured() -> None:
    found = run_on_ranks(this_machine, 2, timeout=200)
    hardware = hardware_of(found[0], 2)
    assert all(value > 0 for value in found[0].values())
    assert hardware.flops(2, 1) == hardware.flops(2, 2) == pytest.approx(found[0]["half"])  # one thread a rank
    assert hardware.bandwidth(2) == pytest.approx(found[0]["link"])
    assert 0.1 < hardware.efficiency < 1.5
