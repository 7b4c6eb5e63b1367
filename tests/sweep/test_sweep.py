"""Every pipeline class of diffusers that makes media from text: the committed results are what the checks give now.

A few classes of different kinds by default; all of them with --full (minutes).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ranks import run_on_ranks

ROOT = Path(__file__).parent.parent.parent
RESULTS = json.loads((ROOT / "src/denoised/spec/pipelines.json").read_text())

# One of each kind: both branches in a batch, a call a branch, text a frame, a scheduler asked for its type, pipelines
# in a pipeline, no progress bar, a scheduler that `components` leaves out, a branch in a batch that cannot be cut.
_FEW = (
    "StableDiffusionPipeline",
    "ChromaPipeline",
    "AnimateDiffPipeline",
    "BriaPipeline",
    "KandinskyV22CombinedPipeline",
    "AnyFlowFARPipeline",
    "LongCatAudioDiTPipeline",
    "StableDiffusionPAGPipeline",
)
_ALL = [pytest.param(name, marks=() if name in _FEW else pytest.mark.slow) for name in sorted(RESULTS["pipelines"])]


@pytest.mark.parametrize("name", _ALL)
@pytest.mark.timeout(600)
def test_pipeline(name: str) -> None:
    from tests.sweep.run import both

    alone, divided = both(name)
    expected = RESULTS["pipelines"][name]
    assert {**alone.checks, **divided.checks} == expected["checks"]
    assert {"alone": alone.forwards, "two ranks": divided.forwards} == expected["forwards"]


def test_every_class_is_accounted_for() -> None:
    """What diffusers exports, takes a prompt and needs nothing else is swept, or has a reason."""
    (found,) = run_on_ranks(_accounts, 1)
    assert found == [], "neither swept nor explained"


def _accounts(rank: int, world_size: int) -> list[str]:
    """Problems, found where diffusers is imported already."""
    from tests.sweep import scope
    from tests.sweep.cases import CASES

    classes, outside = set(scope.with_prompt()), set(scope.out_of_scope())
    accounts = (CASES.keys(), scope.UNBUILT.keys(), scope.OTHERS.keys(), outside)
    named = [name for account in accounts for name in account]
    twice = {name for name in named if named.count(name) > 1}
    swept = RESULTS["pipelines"].keys() | (RESULTS["unbuilt"].keys() - scope.UNBUILT.keys())
    return sorted((classes ^ set(named)) | twice | (CASES.keys() ^ swept) | (outside ^ set(RESULTS["needs_input"])))


def test_the_page_is_up_to_date() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts/pipelines_table.py", "--check"], capture_output=True)
    assert done.returncode == 0, "run: python scripts/pipelines_table.py"


def test_nothing_failed() -> None:
    """A class may have no guidance to divide, or a reason why not; a check that fails is a fault."""
    failed = {
        name: verdict
        for name, entry in RESULTS["pipelines"].items()
        for verdict in entry["checks"].values()
        if verdict.startswith("failed")
    }
    assert failed == {}
