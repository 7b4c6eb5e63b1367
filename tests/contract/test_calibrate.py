"""`denoised calibrate`: what it finds out of a model, and that caches can use it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from denoised import Omni, OmniDiffusionSamplingParams
from denoised.errors import InvalidConfigError, InvalidRequestError
from denoised.features.cache import policy_of
from denoised.features.cache.policies import kinds
from denoised.runtime import calibrating, calibrations
from denoised.runtime.conditions import Conditions
from denoised.runtime.likeness import pictures, ssim
from denoised.runtime.load import BUILTIN
from tests.cli import denoised
from tests.contract.support import as_omni, folder, request_of
from tests.tiny import ROWS


def course(seen: list[list[float]], *, component: str = "transformer", first: int = 0) -> calibrating.Course:
    return calibrating.Course(component=component, numbers=list(range(first, first + len(seen))), seen=seen)


def test_a_fit_finds_the_polynomial_that_made_the_points() -> None:
    wanted = [3.0, -2.0, 0.5]
    change = np.linspace(0.01, 0.4, 12)
    row = course([[]] + [[float(x), float(np.polyval(wanted, x)), 0.9] for x in change])
    found = calibrating.fit([[row, row]], degree=2, probe="input")
    assert found.settings["tea_cache"]["coefficients"] == pytest.approx(wanted, rel=1e-6)
    assert found.r2 == pytest.approx(1.0)
    assert found.settings["mag_cache"]["mag_ratios"] == [1.0] + [0.9] * 12
    assert policy_of("tea_cache", found.settings["tea_cache"]).name == "tea_cache"
    with pytest.raises(InvalidRequestError, match="too few"):
        calibrating.fit([[course(row.seen[:4])]], degree=4, probe="input")


def test_a_fit_knows_components_and_places_in_the_run() -> None:
    """Two experts after each other, the second the longer one: a line of its own for each, ratios by the whole run."""
    lines = {"transformer": [2.0, 0.0], "transformer_2": [-1.0, 1.0]}
    ratios = {"transformer": 0.9, "transformer_2": 0.7}
    seen = {
        name: [[], *([x, float(np.polyval(line, x)), ratios[name]] for x in np.linspace(0.1, 0.4, num))]
        for (name, line), num in zip(lines.items(), (6, 8), strict=True)
    }
    run = [course(found, component=name, first=7 * (name == "transformer_2")) for name, found in seen.items()]
    found = calibrating.fit([run, run], degree=1, probe="input")
    for name, line in lines.items():
        assert found.settings["tea_cache"]["coefficients"][name] == pytest.approx(line, abs=1e-6)
    assert found.r2 == pytest.approx(1.0)
    assert found.settings["mag_cache"]["mag_ratios"] == [1.0, *[0.9] * 6, 1.0, *[0.7] * 8]
    untold = dataclasses.replace(course(seen["transformer"]), numbers=[0] * 7)  # by a program that counts no steps
    assert calibrating.fit([[untold]], degree=1, probe="input").num_steps == 7


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


def test_two_experts_are_calibrated_each_for_itself() -> None:
    """A polynomial of its own for each, a ratio for each step of the whole run, and caches that take them."""
    name = "wan22_t2v"
    prompt, params = as_omni({**request_of(name, 0), "num_inference_steps": 12}, 5, "latent")
    settings: dict[str, Any] = {"model": folder(name), "num_threads": 1}
    found = calibrating.calibrate([prompt], params, degree=1, probe="timestep", settings=settings).settings
    assert found["tea_cache"]["coefficients"].keys() == {"transformer", "transformer_2"}
    ratios = found["mag_cache"]["mag_ratios"]
    assert len(ratios) == 12
    assert [number for number, ratio in enumerate(ratios) if ratio == 1.0] == [0, 4], "the experts' first steps"
    bold = {"tea_cache": {"rel_l1_thresh": 50.0}, "mag_cache": {"threshold": 50.0, "retention_ratio": 0.0}}
    for backend, more in bold.items():
        with Omni(**settings, cache_backend=backend, cache_config=found[backend] | more) as omni:
            (output,) = omni.generate([prompt], params, use_tqdm=False)
        assert output.receipt is not None
        assert output.receipt.cache is not None
        steps = {row["component"]: row["steps"] for row in output.receipt.cache["rows"]}
        assert all("0" in told for told in steps.values()), steps
    wrong = {"coefficients": {"transformer_3": [1.0, 0.0]}}
    with pytest.raises(InvalidConfigError, match=r"coefficients is given for a component, and 'transformer_3' is not"):
        Omni(**settings, cache_backend="tea_cache", cache_config=wrong)
    half = {"coefficients": {"transformer": [1.0, 0.0]}}
    with pytest.raises(InvalidConfigError, match="coefficients of this model are not known"):
        Omni(**settings, cache_backend="tea_cache", cache_config=half)


def test_a_probe_that_a_model_lacks_is_skipped_and_told(tmp_path: Path) -> None:
    """Blocks of Z-Image are given no timestep embedding: the default takes the other. Asked for, it is refused."""
    written = tmp_path / "tea.json"
    asked = ("calibrate", folder("z_image"), "--degree", 1, "--num-inference-steps", 6, "--num-threads", 1)
    asked += ("--height", 64, "--width", 64, "--prompts", tmp_path / "prompts.txt", "--output", written)
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    result = denoised(*asked)
    assert result.exit_code == 0, result.output
    assert "--probe timestep is skipped: " in result.stderr
    assert "given no timestep embedding" in result.stderr
    assert json.loads(written.read_text())["probe"] == "input"
    written.unlink()
    result = denoised(*asked, "--probe", "timestep")
    assert result.exit_code == 2
    assert "given no timestep embedding" in result.stderr
    assert not written.exists()


def test_a_quality_is_kept_and_told() -> None:
    """A caption that the calibration has not seen: as alike as was asked for, by a cache that acts."""
    prompt = {"prompt": "a small green star above a large purple ring", "negative_prompt": ""}
    params = OmniDiffusionSamplingParams(num_inference_steps=20, seed=11)
    with Omni("shapes", num_threads=1) as omni:
        (plain,) = omni.generate([prompt], params, use_tqdm=False)
    with Omni("shapes", num_threads=1, quality="high") as omni:
        (ours,) = omni.generate([prompt], params, use_tqdm=False)
        (short,) = omni.generate([prompt], OmniDiffusionSamplingParams(num_inference_steps=2, seed=11), use_tqdm=False)
    assert ours.receipt is not None
    told = ours.receipt.quality
    assert told is not None
    assert ours.receipt.cache is not None
    assert told["cache_backend"] == ours.receipt.cache["backend"]
    assert told["skipped"] == ours.receipt.cache["skipped"] / 40 > 0.3
    assert told["expected"]["worst_ssim"] >= told["ssim"] == 0.98
    assert 0.98 <= ssim(pictures(ours), pictures(plain))[0] < 1
    assert ours.receipt.notes == []
    assert short.receipt is not None
    (unknown,) = short.receipt.notes
    assert unknown.startswith("warning: quality='high' was measured at 20 to 50 steps, and this request has 2")


def test_what_calibrate_saves_is_what_quality_goes_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line, with one rung of one ladder: two steps of warm-up, then three in a row are skipped."""
    model = tmp_path / "model"
    shutil.copytree(BUILTIN["shapes"], model)
    (model / calibrations.FILE).unlink()
    for name, kind in kinds().items():
        rungs = ({"max_warmup_steps": 2, "residual_diff_threshold": 50.0},) if name == "cache_dit" else ()
        monkeypatch.setattr(kind, "LADDER", rungs, raising=False)
    with pytest.raises(InvalidConfigError, match="denoised calibrate"):
        Omni(str(model), quality="high")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue star\n")
    result = denoised(
        *("calibrate", model, "--prompts", tmp_path / "prompts.txt", "--num-inference-steps", 8, "--probe", "input"),
        *("--degree", 1, "--seed", 1, "--height", 64, "--width", 64, "--save"),
    )
    assert result.exit_code == 0, result.output
    assert "8 steps: 62% skipped, 50% of the blocks run; SSIM " in result.stdout
    (found,) = calibrations.measured(str(model))
    assert (found.num_steps, found.num_pictures, found.skipped, found.work) == (8, 2, 0.625, 0.5)
    assert found.worst <= found.ssim < 1
    seen = calibrations.conditions(str(model))
    assert seen == Conditions(sizes=["64x64"], dtype="float32", quantization={}, adapters=[])
    with Omni(str(model), num_threads=1, quality={"ssim": found.worst}) as omni:
        prompt = {"prompt": "a red circle", "negative_prompt": ""}
        params = OmniDiffusionSamplingParams(num_inference_steps=8, height=64, width=64, true_cfg_scale=4.0, seed=1)
        (output,) = omni.generate([prompt], params, use_tqdm=False)
        (wide,) = omni.generate([prompt], dataclasses.replace(params, width=96, output_type="pt"), use_tqdm=False)
    assert wide.receipt is not None
    (note,) = wide.receipt.notes
    assert note.endswith(
        "measured at 64x64, and this request is 96x64; run `denoised calibrate` with the same to know."
    )
    assert output.receipt is not None
    assert output.receipt.notes == []
    assert output.receipt.quality is not None
    assert output.receipt.quality["cache_config"] == found.config
    assert output.receipt.quality["skipped"] == 0.625
    with pytest.raises(InvalidConfigError, match=f"the best that is known is {found.worst:g}"):
        Omni(str(model), quality={"ssim": found.worst + 1e-4})
