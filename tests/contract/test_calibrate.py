"""`denoised calibrate`: what it finds out of a model, and that caches can use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from denoised import Omni, OmniDiffusionSamplingParams
from denoised.errors import InvalidRequestError
from denoised.features.cache import policy_of
from denoised.runtime import calibrating
from tests.cli import denoised
from tests.contract.support import as_omni, folder, request_of
from tests.tiny import ROWS


def test_a_fit_finds_the_polynomial_that_made_the_points() -> None:
    wanted = [3.0, -2.0, 0.5]
    change = np.linspace(0.01, 0.4, 12)
    row = [[]] + [[float(x), float(np.polyval(wanted, x)), 0.9] for x in change]
    found = calibrating.fit([[row, row]], degree=2, probe="input")
    assert found.settings["tea_cache"]["coefficients"] == pytest.approx(wanted, rel=1e-6)
    assert found.r2 == pytest.approx(1.0)
    assert found.settings["mag_cache"]["mag_ratios"] == [1.0] + [0.9] * 12
    assert policy_of("tea_cache", found.settings["tea_cache"]).name == "tea_cache"
    with pytest.raises(InvalidRequestError, match="too few"):
        calibrating.fit([[row[:4]]], degree=4, probe="input")


def test_a_fit_tells_how_much_it_explains() -> None:
    noisy = np.array([1.0, 3.0, 1.0, 3.0])
    assert calibrating.explained(noisy, np.full(4, 2.0)) == pytest.approx(0.0)
    assert calibrating.explained(noisy, noisy) == 1.0


def test_a_calibration_can_be_used(tmp_path: Path) -> None:
    """From the command line: calibrated, and what it writes given back as cache_config."""
    prompts, written = tmp_path / "prompts.txt", tmp_path / "tea.json"
    prompts.write_text("a red circle\n\na blue star\n")
    result = denoised(
        *("calibrate", "shapes", "--prompts", prompts, "--num-inference-steps", 6, "--probe", "input"),
        *("--degree", 1, "--output", written, "--seed", 1, "--height", 64, "--width", 64),
    )
    assert result.exit_code == 0, result.output
    assert "R² = " in result.stdout
    settings = json.loads(written.read_text())
    assert len(settings["coefficients"]) == 2
    out = tmp_path / "out.png"
    result = denoised(
        *("generate", "a red circle", "--num-inference-steps", 10, "--height", 64, "--width", 64, "--seed", 1),
        *("--cache-backend", "tea_cache", "--cache-config", json.dumps(settings | {"rel_l1_thresh": 0.6})),
        *("--output", out, "--json"),
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["receipt"]["cache"]
    assert told["backend"] == "tea_cache"
    assert 0 < told["skipped"] < 20
    assert out.exists()


def test_the_built_in_model_brings_its_calibration() -> None:
    prompt = {"prompt": "a red circle", "negative_prompt": ""}
    params = OmniDiffusionSamplingParams(num_inference_steps=12, height=64, width=64, seed=1, output_type="latent")
    for backend in ("tea_cache", "mag_cache"):
        with Omni("shapes", num_threads=1, cache_backend=backend) as omni:
            (output,) = omni.generate([prompt], params, use_tqdm=False)
        assert output.error is None, output.error
        assert output.receipt is not None
        assert output.receipt.cache is not None
        assert output.receipt.cache["skipped"] > 0, backend


def test_a_calibration_counts_every_step() -> None:
    prompt, params = as_omni({**request_of("wan22_ti2v", 0), "num_inference_steps": 10}, 5, "latent")
    settings: dict[str, Any] = {"model": folder("wan22_ti2v"), "num_threads": 1}
    found = calibrating.calibrate([prompt], params, degree=1, probe="timestep", settings=settings)
    assert found.num_points == 9 * ROWS["wan22_ti2v"].branches
    assert found.num_steps == len(found.settings["mag_cache"]["mag_ratios"]) == 10
    assert found.r2 <= 1
